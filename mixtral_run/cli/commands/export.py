"""`mixtral-run export`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.launch.imports import importing


@click.command(
    cls=VerbCommand,
    examples=(
        "export --adapter adapter --output-path peft-adapter --format vllm",
        "export --adapter adapter --merge --hf-model-path mistralai/Mixtral-8x7B-v0.1 --output-path merged",
    ),
)
@config_options(ExportConfig)
def export(config: ExportConfig) -> None:
    """Write an adapter as a PEFT directory, or with --merge a full HF model with the adapter merged in."""
    with importing():
        from mixtral_run.weights.adapter.export import export as job

    job(config)

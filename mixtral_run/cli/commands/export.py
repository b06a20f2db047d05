"""`mixtral-run export`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import ExportConfig


@click.command()
@config_options(ExportConfig)
def export(config: ExportConfig) -> None:
    """Write an adapter as a PEFT directory, or with --merge a full HF model with the adapter in it."""
    from mixtral_run.weights.adapter.export import export as job

    job(config)

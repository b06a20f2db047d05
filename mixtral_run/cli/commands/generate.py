"""`mixtral-run generate`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.launch.imports import importing
from mixtral_run.launch.run_job import run_job
from mixtral_run.train.jobs import GENERATE


@click.command(
    cls=VerbCommand,
    examples=(
        'generate --load mixtral --adapter adapter --instruction "Name the three states of matter."',
        "generate --load mixtral --prompts questions.jsonl --output answers.jsonl --batch-size 32",
    ),
)
@config_options(GenerateConfig)
def generate(config: GenerateConfig) -> None:
    """Continue prompts with a base model, with or without an adapter."""
    with importing():
        from mixtral_run.planner.available import ask_ahead

    # Both start processes that work while this one imports torch.
    if not config.has_layout:
        ask_ahead(config)
    GENERATE.import_ahead()

    with importing():
        from mixtral_run.planner.choose import settled
        from mixtral_run.train.preflight import check_inference, with_base_here

    run_job(GENERATE, settled(with_base_here(config)), lambda checked, _: check_inference(checked))

"""`mixtral-run plan`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import PlanConfig


@click.command()
@config_options(PlanConfig)
def plan(config: PlanConfig) -> None:
    """What a LoRA run takes of each GPU, by part, for each layout; the best that fits first. Needs no GPU."""
    from mixtral_run.planner.table import show_plan

    show_plan(config)

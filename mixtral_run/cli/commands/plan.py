"""`mixtral-run plan`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import PlanConfig


@click.command()
@config_options(PlanConfig)
def plan(config: PlanConfig) -> None:
    """Print the memory that a LoRA run needs on each GPU, by part, for each layout; the best that fits first.

    Needs no GPU. Without --gpu it plans for the GPU of this machine, and for Hopper if there is none.
    """
    from mixtral_run.planner.table import show_plan

    show_plan(config)

"""`mixtral-run plan`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.plan import PlanConfig


@click.command(
    cls=VerbCommand,
    examples=(
        "plan --gpus 8 --gpu h100 --seq-length 4096",
        "plan --gpus 1 --gpu-memory 40 --base-precision nf4 --all",
    ),
)
@config_options(PlanConfig)
def plan(config: PlanConfig) -> None:
    """Print the memory that a LoRA run needs on each GPU, by part, for each layout. The best that fits comes first.

    Needs no GPU. Without --gpu it plans for the GPU of this machine, and for Hopper if there is none.
    """
    from mixtral_run.planner.table import show_plan

    show_plan(config)

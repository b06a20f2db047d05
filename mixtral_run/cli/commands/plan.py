"""`mixtral-run plan`."""

from __future__ import annotations

import contextlib
import io

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.errors import MixtralRunError


@click.command(
    cls=VerbCommand,
    examples=(
        "plan --gpus 8 --gpu h100 --seq-length 4096",
        "plan --gpus 1 --gpu-memory 40 --base-precision nf4 --all",
    ),
)
@config_options(PlanConfig, errors_as_json=True)
def plan(config: PlanConfig) -> None:
    """Print the memory that a LoRA run needs on each GPU, by part, for each layout. The best that fits comes first.

    Needs no GPU. Without --gpu it plans for the GPU of this machine, and for Hopper if there is none.
    """
    from mixtral_run.planner.table import show_plan
    from mixtral_run.terminal.report import error_as_json

    if not config.json:
        show_plan(config)
        return
    # A plan in which no layout fits is printed before its error is raised.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            show_plan(config)
    except MixtralRunError:
        with error_as_json(not printed.getvalue()):
            raise
    finally:
        click.echo(printed.getvalue(), nl=False)

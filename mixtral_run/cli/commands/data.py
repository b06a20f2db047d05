"""`mixtral-run data check`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand, VerbGroup
from mixtral_run.cli.options import config_options
from mixtral_run.config.data import CheckConfig


@click.group(cls=VerbGroup)
def data() -> None:
    """Look at data before a training run."""


@data.command(
    cls=VerbCommand,
    examples=(
        "data check my.jsonl --load mixtral --seq-length 2048",
        "data check parquet/ OWNER/NAME:train --data-format alpaca --json",
    ),
)
@config_options(CheckConfig)
def check(config: CheckConfig) -> None:
    """Read data and show what a training run would learn from them. It needs no GPU, and no weights."""
    from mixtral_run.train.data.check.run_check import run_check

    run_check(config)

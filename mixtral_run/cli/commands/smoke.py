"""`mixtral-run smoke`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.trial import SmokeConfig
from mixtral_run.launch.imports import importing


@click.command(
    cls=VerbCommand,
    examples=(
        "smoke --load mixtral",
        "smoke --on gpu-01 --random-layers 4 --load smoke/checkpoint",
    ),
)
@config_options(SmokeConfig)
def smoke(config: SmokeConfig) -> None:
    """Convert if necessary, pretrain, fine-tune and generate on this machine, and print a table of pass or fail."""
    with importing():
        from mixtral_run.train.jobs import FINETUNE

    # The fork server imports while this process imports torch.
    FINETUNE.import_ahead()

    with importing():
        from mixtral_run.trial.smoke import smoke as job

    job(config)

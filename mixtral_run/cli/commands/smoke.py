"""`mixtral-run smoke`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import SmokeConfig


@click.command()
@config_options(SmokeConfig)
def smoke(config: SmokeConfig) -> None:
    """Convert if not yet done, pretrain, fine-tune and generate on this machine; a table says pass or fail."""
    from mixtral_run.train.jobs import FINETUNE

    # The fork server imports while this process imports torch.
    FINETUNE.import_ahead()

    from mixtral_run.trial.smoke import smoke as job

    job(config)

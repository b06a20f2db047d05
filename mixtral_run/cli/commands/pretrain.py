"""`mixtral-run pretrain`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import PretrainConfig
from mixtral_run.launch.run_job import run_job


@click.command()
@config_options(PretrainConfig)
def pretrain(config: PretrainConfig) -> None:
    """Train all weights for a few iterations, to prove that a layout trains. Nothing is saved."""

    from mixtral_run.launch.processes import import_ahead

    # Before the import below, which brings torch.
    import_ahead()

    from mixtral_run.train.preflight import with_base_here

    config = with_base_here(config)

    def job() -> None:
        from mixtral_run.train.loop import pretrain

        pretrain(config)

    def check(world_size: int) -> None:
        from mixtral_run.train.preflight import check_training

        check_training(config, world_size)

    run_job("pretrain", config, job, check)

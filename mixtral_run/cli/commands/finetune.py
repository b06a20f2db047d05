"""`mixtral-run finetune`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import FinetuneConfig
from mixtral_run.launch.run_job import run_job


@click.command()
@config_options(FinetuneConfig)
def finetune(config: FinetuneConfig) -> None:
    """Fine-tune a converted checkpoint with LoRA: attention and experts, one adapter an expert."""

    from mixtral_run.launch.processes import import_ahead
    from mixtral_run.planner.available import ask_ahead

    # Before the imports below, which bring torch.
    ask_ahead(config)
    import_ahead()

    from mixtral_run.planner.choose import settled
    from mixtral_run.train.preflight import with_base_here

    config = settled(with_base_here(config))

    def job() -> None:
        from mixtral_run.train.loop import finetune

        finetune(config)

    def check(world_size: int) -> None:
        from mixtral_run.train.preflight import check_training

        check_training(config, world_size)

    run_job("finetune", config, job, check)

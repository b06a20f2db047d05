"""`mixtral-run finetune`."""

from __future__ import annotations

import click

from mixtral_run.commands.jobs import run_job
from mixtral_run.commands.options import config_options
from mixtral_run.config import FinetuneConfig


@click.command()
@config_options(FinetuneConfig)
def finetune(config: FinetuneConfig) -> None:
    """Fine-tune a converted checkpoint with LoRA: attention and experts, one adapter an expert."""

    from mixtral_run.launch import import_ahead
    from mixtral_run.memory import ask_ahead

    # Before the imports below, which bring torch.
    ask_ahead(config)
    import_ahead()

    from mixtral_run.fitting import settled
    from mixtral_run.train.preflight import with_base_here

    config = settled(with_base_here(config))

    def job() -> None:
        from mixtral_run.train.loop import finetune

        finetune(config)

    def check(world_size: int) -> None:
        from mixtral_run.train.preflight import check_training

        check_training(config, world_size)

    run_job("finetune", config, job, check)

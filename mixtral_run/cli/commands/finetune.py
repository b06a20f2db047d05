"""`mixtral-run finetune`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.training import FinetuneConfig
from mixtral_run.launch.run_job import run_job
from mixtral_run.train.jobs import FINETUNE


@click.command(
    cls=VerbCommand,
    examples=(
        "finetune --load mixtral --data-path my.jsonl --save adapter",
        "finetune --on gpu-01 --load mixtral --data-path my.jsonl --save adapter --base-precision fp8",
    ),
)
@config_options(FinetuneConfig)
def finetune(config: FinetuneConfig) -> None:
    """Fine-tune a base model with LoRA: attention and experts, with one adapter per expert."""
    from mixtral_run.planner.available import ask_ahead

    # Both start processes that work while this one imports torch.
    ask_ahead(config)
    FINETUNE.import_ahead()

    from mixtral_run.planner.choose import settled
    from mixtral_run.train.init_adapter import with_adapter_settings
    from mixtral_run.train.preflight import check_training, is_complete, with_base_here

    config = settled(with_adapter_settings(with_base_here(config)))
    if is_complete(config):
        return
    run_job(FINETUNE, config, check_training)

"""`mixtral-run finetune`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.launch.imports import importing
from mixtral_run.launch.processes import is_worker, rank
from mixtral_run.launch.run_job import run_job
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.reading.stdin_copy import with_stdin_copied
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
    run_training(config)


def run_training(config: FinetuneConfig) -> None:
    """Run the job of `finetune`, or with an AlignConfig that of `align`."""
    with importing():
        from mixtral_run.planner.available import ask_ahead

    config = with_stdin_copied(config, is_worker=is_worker())
    # Both start processes that work while this one imports torch.
    ask_ahead(config)
    FINETUNE.import_ahead()

    with importing():
        from mixtral_run.planner.choose import settled
        from mixtral_run.train.checkpoints.init_adapter import with_adapter_settings
        from mixtral_run.train.checkpoints.resume_checks import RunCompleteError
        from mixtral_run.train.preflight import check_training, with_base_here

    try:
        run_job(FINETUNE, settled(with_adapter_settings(with_base_here(config))), check_training)
    except RunCompleteError as complete:
        if rank() == 0:
            Report().done(complete.what)

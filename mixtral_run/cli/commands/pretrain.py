"""`mixtral-run pretrain`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.launch.imports import importing
from mixtral_run.launch.processes import is_worker, rank
from mixtral_run.launch.run_job import run_job
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.reading.stdin_copy import with_stdin_copied
from mixtral_run.train.jobs import PRETRAIN


@click.command(
    cls=VerbCommand,
    examples=(
        "pretrain --load mixtral --mock-data --tensor-model-parallel-size 2 --expert-model-parallel-size 4",
        "pretrain --on gpu-01 --load mixtral --data-path my.jsonl --save tuned --epochs 1 --lr 1e-5 --min-lr 1e-6 "
        "--offload-optimizer",
    ),
)
@config_options(PretrainConfig)
def pretrain(config: PretrainConfig) -> None:
    """Train all weights: full fine-tuning with --save, else a few iterations to prove that a layout trains.

    With --save, AdamW trains, and each checkpoint is a base that every verb takes as --load. One of Mixtral 8x7B has
    654 GB, 93 GB of them weights: --keep-last 1 keeps the newest. A usual --lr is 1e-5. Without --save, SGD trains,
    and nothing is left. `mixtral-run plan --full` counts the memory.
    """
    with importing():
        from mixtral_run.planner.available import ask_ahead

    config = with_stdin_copied(config, is_worker=is_worker())
    # Both start processes that work while this one imports torch.
    if not config.has_layout:
        ask_ahead(config)
    PRETRAIN.import_ahead()

    with importing():
        from mixtral_run.planner.choose import settled
        from mixtral_run.train.checkpoints.resume_checks import RunCompleteError
        from mixtral_run.train.preflight import check_training, with_base_here

    try:
        run_job(PRETRAIN, settled(with_base_here(config)), check_training)
    except RunCompleteError as complete:
        if rank() == 0:
            Report().done(complete.what)

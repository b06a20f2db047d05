"""`mixtral-run align`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.commands.finetune import run_training
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.align import AlignConfig


@click.command(
    cls=VerbCommand,
    examples=(
        "align --method dpo --load mixtral --data-path pairs.jsonl --save adapter",
        "align --on gpu-01 --method kto --load mixtral --data-path labels.jsonl --save adapter --base-precision fp8",
    ),
)
@config_options(AlignConfig)
def align(config: AlignConfig) -> None:
    """Fine-tune a base model with LoRA on preferences: DPO, KTO, ORPO or SimPO.

    The reference is the same model with its adapters off, or with those of --init-adapter: no second copy is in
    memory.
    """
    run_training(config)

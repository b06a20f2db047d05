"""`mixtral-run convert`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.weights import ConvertConfig


@click.command(
    cls=VerbCommand,
    examples=(
        "convert --hf-model-path mistralai/Mixtral-8x7B-v0.1 --output-path mixtral",
        "convert --from-megatron mixtral --adapter adapter --hf-model-path Mixtral-8x7B-v0.1 --output-path merged",
    ),
)
@config_options(ConvertConfig)
def convert(config: ConvertConfig) -> None:
    """Convert HF weights to a Megatron torch_dist checkpoint, streamed. No model is built, and no GPU is used.

    With --from-megatron convert a checkpoint back to an HF model.
    """
    from mixtral_run.launch import processes

    # Under the user's torchrun one process does the work. More processes would not be faster.
    if processes.rank() != 0:
        return
    if config.from_megatron is not None:
        from mixtral_run.weights.convert.to_hf import to_hf

        to_hf(config)
    else:
        from mixtral_run.weights.convert.to_megatron import convert as job

        job(config)

"""`mixtral-run convert`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import ConvertConfig


@click.command()
@config_options(ConvertConfig)
def convert(config: ConvertConfig) -> None:
    """Convert HF weights to a Megatron torch_dist checkpoint, streamed: no model is built, no GPU is used.

    With --from-megatron a checkpoint becomes an HF model again.
    """
    from mixtral_run.launch import processes

    # Under somebody's torchrun one process does the work; more would not be faster.
    if processes.rank() != 0:
        return
    if config.from_megatron is not None:
        from mixtral_run.weights.convert.to_hf import to_hf

        to_hf(config)
    else:
        from mixtral_run.weights.convert.to_megatron import convert as job

        job(config)

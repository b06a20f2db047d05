"""Patch that lets Megatron's own checkpoint writer, whose files the kit has to read, run without a GPU."""

from __future__ import annotations

import torch


def let_it_write_from_a_cpu() -> None:
    """Disable the writer's wait for copies from the GPU, because copies on a CPU are complete when they return.

    The writer waits in dist_checkpointing/strategies/filesystem_async.py:230.
    """
    torch.cuda.synchronize = _nothing_to_wait_for


def _nothing_to_wait_for(device: object = None) -> None:
    pass

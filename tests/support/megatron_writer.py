"""Megatron's own checkpoint writer, whose files the kit has to read, on machines without a GPU."""

from __future__ import annotations

import torch


def let_it_write_from_a_cpu() -> None:
    """It waits for the GPU's copies (dist_checkpointing/strategies/filesystem_async.py:230); a CPU's have ended."""
    torch.cuda.synchronize = _nothing_to_wait_for


def _nothing_to_wait_for(device: object = None) -> None:
    pass

"""Torch's allocator on GPUs: segments that grow while a model is trained by eager passes.

A block that is free serves another tensor only if that fits into it, and what was reserved at once stays one piece. The
experts of a layer get another number of rows in each layer and step, and their tensors have gigabytes: a block of the
step before is often a little too small, and another one is reserved beside it. With rows of 65,536 tokens over two H200
the reserved memory grew from 90 to 112 GB in three steps, although each step freed all that it had made. A segment that
grows has no such borders.

Passes that are captured as CUDA graphs keep plain segments: there NCCL registers the buffers of collectives, and takes
each for a part of one allocation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger(__name__)

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The user's settings of the allocator. torch reads the second one only without the first."""
PROBE_BYTES = 32 * 1024**2
"""Allocated once to see whether the driver lets segments grow."""


@contextmanager
def growing_segments(device: torch.device) -> Iterator[None]:
    """Let new segments grow within the block on a GPU, unless its driver cannot, or the user decided about segments.

    Rank-local.
    """
    settings = settings_of(os.environ, grow=True) if device.type == "cuda" else None
    if settings is None or not _grow(settings, device):
        yield
        return
    try:
        yield
    finally:
        _set(settings_of(os.environ, grow=False))


def settings_of(environment: Mapping[str, str], *, grow: bool) -> str | None:
    """Return the allocator's settings, with those that the user gave; None if the user decided about segments."""
    given = next((environment[name] for name in VARIABLES if environment.get(name)), None)
    own = f"expandable_segments:{grow}"
    if given is None:
        return own
    # torch's second allocator has no segments.
    return None if "expandable_segments" in given or "cudaMallocAsync" in given else f"{given},{own}"


def _grow(settings: str, device: torch.device) -> bool:
    """Return True if segments grow from now on; otherwise say why not."""
    # Free plain segments, which loading left, would be used first and stay.
    torch.cuda.empty_cache()
    try:
        _set(settings)
        torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    except (AttributeError, RuntimeError, ValueError) as error:
        if not isinstance(error, AttributeError):
            _set(settings_of(os.environ, grow=False))
        why = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("Segments of GPU memory cannot grow here (%s): long rows may reserve half as much again.", why)
        return False
    return True


def _set(settings: str | None) -> None:
    module: Any = torch._C
    module._accelerator_setAllocatorSettings(settings)

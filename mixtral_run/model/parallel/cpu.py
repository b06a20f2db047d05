"""Where megatron-core 0.16.1 insists on CUDA, stand in for it: on machines without a GPU, and for nothing else.

Megatron allocates its communication buffers and weights on `torch.cuda.current_device()` (tensor_parallel/layers.py,
tensor_parallel/mappings.py), which has an exact meaning on a CPU.
"""

from __future__ import annotations

import torch


def stand_in_for_cuda() -> None:
    """Make Megatron allocate on the CPU in this process. Raises RuntimeError where there is a GPU context already."""
    if torch.cuda.is_initialized():
        raise RuntimeError("this process already uses a GPU")
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]


def _cpu_device() -> torch.device:
    return torch.device("cpu")

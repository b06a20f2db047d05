"""A replacement for CUDA where megatron-core 0.16.1 requires it, for processes on a CPU only.

Megatron allocates its communication buffers and weights on `torch.cuda.current_device()` (tensor_parallel/layers.py,
tensor_parallel/mappings.py); on a CPU that is simply the CPU device.
"""

from __future__ import annotations

import torch


def stand_in_for_cuda() -> None:
    """Make Megatron allocate on the CPU in this process. Raises RuntimeError if the process already uses a GPU."""
    if torch.cuda.is_initialized():
        raise RuntimeError("this process already uses a GPU")
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]


def _cpu_device() -> torch.device:
    return torch.device("cpu")

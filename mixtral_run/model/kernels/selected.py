"""The set of kernels that this process uses for the experts' products (requirements.py).

It is a property of the process, as its GPU is: one process computes one model, and products are called where neither
the model nor its settings are known. `build_model` selects it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mixtral_run.model.kernels.requirements import Capability, KernelSet, kernel_set_of

_wanted: list[str] = ["auto"]
_ahead: list[Capability] = []


def select(kernels: str) -> None:
    """Let this process use the kernels of a value of --kernels."""
    _wanted[0] = kernels


@contextmanager
def selecting(kernels: str) -> Iterator[None]:
    """Select a set of kernels while this lasts."""
    before = _wanted[0]
    select(kernels)
    try:
        yield
    finally:
        select(before)


@contextmanager
def compiling_for(capability: Capability) -> Iterator[None]:
    """While this lasts, tensors on the device meta count as on a GPU of this compute capability.

    For model/compile_kernels.py.
    """
    _ahead.append(capability)
    try:
        yield
    finally:
        _ahead.pop()


def kernels_of(device: torch.device) -> KernelSet | None:
    """Return the set that is selected on a device; None on a CPU, and on GPUs on which no set runs."""
    return kernel_set_of(capability_of(device), _wanted[0])


def capability_of(device: torch.device) -> Capability | None:
    """Return the compute capability of a GPU, None for other devices."""
    if device.type == "meta" and _ahead:
        return _ahead[-1]
    return _capability(device) if device.type == "cuda" else None


@functools.cache
def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)


def num_multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; on the device meta, where nothing runs, 1."""
    if device.type == "meta":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count

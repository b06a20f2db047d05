"""GPU models that the planner knows by name. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuModel:
    """One GPU model.

    memory_gib: total memory as torch reports it. compute_capability: major and minor number. sold_as: the number in its
    name or data sheet, which is neither GiB nor all usable.
    """

    memory_gib: float
    compute_capability: tuple[int, int]
    sold_as: int


GPU_MODELS = {
    "a100-40g": GpuModel(39.4, (8, 0), 40),
    "a100-80g": GpuModel(79.1, (8, 0), 80),
    "a40": GpuModel(44.3, (8, 6), 48),
    "h100": GpuModel(79.1, (9, 0), 80),
    "h200": GpuModel(139.7, (9, 0), 141),
    "b200": GpuModel(178.3, (10, 0), 192),
}
HOPPER = (9, 0)
"""Compute capability of H100 and H200, which the planner assumes if it does not know the GPU."""
GPUS_PER_HOST = 8
DEFAULT_MEMORY_GIB = 80.0

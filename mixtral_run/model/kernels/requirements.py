"""Requirements of the kernels as arithmetic on sizes and compute capability. Standard library only, so that the planner
can ask about GPUs that are not in this machine.
"""

from __future__ import annotations

Capability = tuple[int, int]
"""A GPU's compute capability, major and minor number."""

GROUPED_MM_CAPABILITY: Capability = (9, 0)
"""Least compute capability on which torch's grouped matrix product reads the experts' offsets on the device."""
BF16_BYTES = 2
ALIGNMENT_BYTES = 16
"""Alignment that the grouped product requires of every matrix's rows."""


def grouped_mm_runs_on_device(capability: Capability, element_bytes: int, *widths: int) -> bool:
    """Return True if torch's grouped matrix product takes these matrices without a host synchronization.

    It takes bf16. Capability 9.0 and 10.0 have kernels of their own; on 8.x torch falls back to a loop over the
    experts, which copies the offsets to the host (ATen/native/cuda/GroupedBlas.cpp).

    Args:
        capability: of the GPU.
        element_bytes: bytes of an element of both matrices.
        widths: lengths of the matrices' rows, in elements.
    """
    return (
        capability >= GROUPED_MM_CAPABILITY
        and element_bytes == BF16_BYTES
        and all(width * element_bytes % ALIGNMENT_BYTES == 0 for width in widths)
    )

"""Requirements of the kernels as arithmetic on sizes and compute capability. Standard library only, so that the planner
can ask about GPUs that are not in this machine.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

Capability = tuple[int, int]
"""A GPU's compute capability, major and minor number."""


class KernelSet(enum.Enum):
    """The kernels of the experts' grouped products. All of them read the experts' offsets on the device."""

    PORTABLE = "portable"
    """Triton only, for compute capability 8.0 and more (portable_mm_triton.py)."""
    HOPPER = "hopper"
    """Products with Hopper's own instructions where they run, and torch's grouped product. It has kernels for compute
    capability 9.x and 10.x; on other GPUs it is a loop that waits for the offsets (ATen/native/cuda/GroupedBlas.cpp).
    """


HOPPER: Capability = (9, 0)
PORTABLE_CAPABILITY: Capability = (8, 0)
"""Least compute capability with bf16 products and asynchronous copies, which the portable kernels use."""
HOPPER_MAJORS = (9, 10)
"""Major numbers of the compute capabilities on which the set hopper runs."""
EIGHT_BIT_CAPABILITY: Capability = (9, 0)
"""The compute capability that the 8-bit products are made for (quantized/quantized_mm.py)."""
NATIVE_FLOAT8: Capability = (8, 9)
"""Least compute capability whose Triton kernels can read float8."""
EIGHT_BIT_ALIGNMENT = 16
"""Factor that both sides of a matrix in 8 bit must have (torch._scaled_mm)."""
QUANTIZED_AT_ONCE = 16 * 2**20
"""Most numbers of a weight that are quantized at a time while a base is loaded: their fp32 copies take up to
QUANTIZING_BYTES each."""
QUANTIZING_BYTES = {"fp8": 12, "nf4": 13}
"""Temporary bytes of each number that is quantized (quantized_mm.quantize_to), its results included."""
BF16_BYTES = 2
ALIGNMENT_BYTES = 16
"""Alignment that the grouped product requires of every matrix's rows."""
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""Most shared memory of a program, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
LEAST_SHARED_KIB = 99


def kernel_set_of(capability: Capability | None, wanted: str = "auto") -> KernelSet | None:
    """Return the set of kernels that --kernels selects on a GPU; None if it has none, as a CPU, or not the wanted one.

    Args:
        capability: of the GPU; None for a CPU.
        wanted: a value of --kernels.
    """
    if capability is None or capability < PORTABLE_CAPABILITY:
        return None
    if wanted == KernelSet.PORTABLE.value:
        return KernelSet.PORTABLE
    if capability[0] in HOPPER_MAJORS:
        return KernelSet.HOPPER
    return None if wanted == KernelSet.HOPPER.value else KernelSet.PORTABLE


def kernel_problems(capability: Capability | None, kernels: str) -> list[str]:
    """Return why a value of --kernels cannot be used on a GPU. capability: None for a CPU, which has no kernels."""
    if kernels == "auto" or kernel_set_of(capability, kernels) is not None:
        return []
    needed = "9.x or 10.x (H100, H200, B200)" if kernels == KernelSet.HOPPER.value else "8.0 or more (A100, A40)"
    found = "a CPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
    return [f"--kernels {kernels}: expected GPUs of compute capability {needed}; found {found}"]


def attention_problems(
    capability: Capability | None,
    kernels: str,
    element_bytes: int,
    widths: Sequence[int],
    tensor_sizes: Sequence[int] = (),
) -> list[str]:
    """Return why --attention-precision fp8 cannot be used on a GPU. On a CPU the weights are dequantized.

    Args:
        capability: of the GPU; None for a CPU.
        kernels: the value of --kernels.
        element_bytes: bytes of an activation.
        widths: sides of the weights of a process.
        tensor_sizes: the sizes of TP with which this model's sides can be multiplied in 8 bit.
    """
    if capability is None:
        return []
    flag, found = "--attention-precision fp8", []
    if capability != EIGHT_BIT_CAPABILITY:
        found.append(
            f"{flag}: expected GPUs of compute capability 9.0 (H100, H200), on which the products in 8 bit are tested; "
            f"found {capability[0]}.{capability[1]}"
        )
    elif kernel_set_of(capability, kernels) is not KernelSet.HOPPER:
        found.append(
            f"{flag}: expected --kernels auto or hopper, as the portable kernels have no products in 8 bit; "
            f"found --kernels {kernels}"
        )
    if element_bytes != BF16_BYTES:
        found.append(f"{flag}: expected --dtype bf16, which the products in 8 bit return; found another dtype")
    if odd := sorted({width for width in widths if width % EIGHT_BIT_ALIGNMENT}):
        found.append(
            f"{flag}: expected weights whose sides on a GPU are multiples of {EIGHT_BIT_ALIGNMENT}; found "
            f"{', '.join(map(str, odd))}; "
            + (
                f"{' or '.join(f'--tensor-model-parallel-size {size}' for size in tensor_sizes)} makes them so"
                if tensor_sizes
                else "no --tensor-model-parallel-size makes them so"
            )
        )
    return found


def grouped_mm_runs_on_device(kernels: KernelSet | None, element_bytes: int, *widths: int) -> bool:
    """Return True if the grouped products take these matrices without a host synchronization. They take bf16.

    Args:
        kernels: the set that is selected; None for none.
        element_bytes: bytes of an element of both matrices.
        widths: lengths of the matrices' rows, in elements.
    """
    return (
        kernels is not None
        and element_bytes == BF16_BYTES
        and all(width * element_bytes % ALIGNMENT_BYTES == 0 for width in widths)
    )


def shared_memory_bytes(capability: Capability) -> int:
    """Return the most shared memory of a program on a GPU; of an unknown one, that of the smallest known."""
    return 1024 * SHARED_KIB.get(capability, LEAST_SHARED_KIB)

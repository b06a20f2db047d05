"""Triton kernel of optimizer/adamw.py: one launch updates all parameters, whose addresses are in a table on the device.

The arithmetic is that of torch's fused kernel, which computes in fp32 with these multiply-adds
(aten/src/ATen/native/cuda/fused_adam_utils.cuh). Import this module only on machines with a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.optimizer.layout import CHUNK, CORRECTION_FIELDS, GROUP_FIELDS, TENSOR_FIELDS

BLOCK = 2048
"""Elements that a program has in registers at once."""
WARPS = 8


@triton.jit
def _update_block(
    param_ptr,
    gradient_ptr,
    average_ptr,
    square_ptr,
    copy_ptr,
    has_copy,
    start,
    numel,
    factor,
    decay,
    beta1,
    beta2,
    step_size,
    root,
    eps,
    CLIPS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = start + tl.arange(0, BLOCK)
    # Without a mask where a block is full: a mask that ends anywhere would make each load one of 4 bytes.
    if MASKED:
        inside = places < numel
        param = tl.load(param_ptr + places, mask=inside, other=0.0)
        gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0)
        average = tl.load(average_ptr + places, mask=inside, other=0.0)
        square = tl.load(square_ptr + places, mask=inside, other=0.0)
    else:
        param = tl.load(param_ptr + places)
        gradient = tl.load(gradient_ptr + places)
        average = tl.load(average_ptr + places)
        square = tl.load(square_ptr + places)
    if CLIPS:
        gradient = gradient * factor
    # Without decay torch leaves the parameter alone, an infinite one too.
    param = tl.where(decay != 0.0, tl.fma(-decay, param, param), param)
    average = tl.fma(beta1, average, tl.fma(-beta1, gradient, gradient))
    squared = gradient * gradient
    square = tl.fma(beta2, square, tl.fma(-beta2, squared, squared))
    change = tl.div_rn(step_size * average, tl.div_rn(tl.sqrt_rn(square), root) + eps)
    param = param - change
    if MASKED:
        tl.store(param_ptr + places, param, mask=inside)
        tl.store(average_ptr + places, average, mask=inside)
        tl.store(square_ptr + places, square, mask=inside)
        if has_copy:
            tl.store(copy_ptr + places, param.to(tl.bfloat16), mask=inside)
    else:
        tl.store(param_ptr + places, param)
        tl.store(average_ptr + places, average)
        tl.store(square_ptr + places, square)
        if has_copy:
            tl.store(copy_ptr + places, param.to(tl.bfloat16))


@triton.jit
def _adamw_kernel(
    chunks_ptr,
    tensors_ptr,
    groups_ptr,
    corrections_ptr,
    factor_ptr,
    CLIPS: tl.constexpr,
    TENSOR_FIELDS: tl.constexpr,
    GROUP_FIELDS: tl.constexpr,
    CORRECTION_FIELDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = chunks_ptr + 2 * tl.program_id(0)
    row = tensors_ptr + tl.load(chunk) * TENSOR_FIELDS
    first = tl.load(chunk + 1) * CHUNK
    # Addresses are multiples of 16 (adamw.py checks it); the compiler cannot know that of loaded ones.
    gradient_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    param_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    average_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
    square_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    copy_address = tl.load(row + 4)
    copy_ptr = tl.multiple_of(copy_address.to(tl.pointer_type(tl.bfloat16)), 16)
    step = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)))
    numel = tl.load(row + 6).to(tl.int32)
    group = groups_ptr + tl.load(row + 7) * GROUP_FIELDS
    rate = tl.load(group)
    beta1 = tl.load(group + 1)
    beta2 = tl.load(group + 2)
    decay = rate * tl.load(group + 3)
    eps = tl.load(group + 4)
    # The last of a group's corrections are those of all later steps.
    at = tl.load(row + 8) + tl.minimum(tl.maximum(step.to(tl.int64), 1), tl.load(row + 9)) - 1
    step_size = tl.div_rn(rate, tl.load(corrections_ptr + at * CORRECTION_FIELDS))
    root = tl.load(corrections_ptr + at * CORRECTION_FIELDS + 1)
    factor = 1.0
    if CLIPS:
        factor = tl.load(factor_ptr)
    for part in range(0, CHUNK, BLOCK):
        start = first + part
        if start + BLOCK <= numel:
            _update_block(
                param_ptr, gradient_ptr, average_ptr, square_ptr, copy_ptr, copy_address != 0, start, numel, factor,
                decay, beta1, beta2, step_size, root, eps, CLIPS, False, BLOCK,
            )  # fmt: skip
        elif start < numel:
            _update_block(
                param_ptr, gradient_ptr, average_ptr, square_ptr, copy_ptr, copy_address != 0, start, numel, factor,
                decay, beta1, beta2, step_size, root, eps, CLIPS, True, BLOCK,
            )  # fmt: skip


def update(
    chunks: Tensor, tensors: Tensor, groups: Tensor, corrections: Tensor, factor: Tensor | None, **options: int
) -> None:
    """Take one step of AdamW for all tensors of a table (adamw.py), whose steps are already counted.

    Args:
        chunks: int32 [chunks, 2], the row of a tensor, and the number of a chunk in it.
        tensors: int64 [tensors, TENSOR_FIELDS].
        groups: fp32 [groups, GROUP_FIELDS].
        corrections: fp32 [steps, CORRECTION_FIELDS].
        factor: fp32 scalar by which gradients are multiplied; None for 1. The gradients themselves stay as they are.
        options: other values of CHUNK, BLOCK and num_warps, for benchmarks.
    """
    settings = {"CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": WARPS, **options}
    _adamw_kernel[(chunks.shape[0],)](
        chunks,
        tensors,
        groups,
        corrections,
        factor if factor is not None else groups,
        CLIPS=factor is not None,
        TENSOR_FIELDS=TENSOR_FIELDS,
        GROUP_FIELDS=GROUP_FIELDS,
        CORRECTION_FIELDS=CORRECTION_FIELDS,
        **settings,
    )

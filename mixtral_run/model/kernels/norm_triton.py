"""Triton kernels of norm.py: RMSNorm with the addition before it, and its gradient with the one behind it.

A program computes a row, which is in registers. Import only on machines with a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384


@triton.jit
def _add_norm_kernel(
    hidden_ptr,
    addition_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    factors_ptr,
    width,
    eps,
    HAS_ADDITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    places = row * width + columns
    total = tl.load(hidden_ptr + places, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDITION:
        addition = tl.load(addition_ptr + places, mask=inside, other=0.0)
        total = (total.to(tl.float32) + addition.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + places, total, mask=inside)
    exact = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(exact * exact, axis=0) / width + eps)
    tl.store(factors_ptr + row, factor)
    tl.store(normed_ptr + places, (exact * factor * weight).to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_backward_kernel(
    total_ptr,
    weight_ptr,
    factors_ptr,
    for_normed_ptr,
    for_total_ptr,
    output_ptr,
    width,
    HAS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    places = row * width + columns
    total = tl.load(total_ptr + places, mask=inside, other=0.0)
    gradient = tl.load(for_normed_ptr + places, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    factor = tl.load(factors_ptr + row)
    unit = total.to(tl.float32) * factor
    gradient = gradient.to(tl.float32) * weight.to(tl.float32)
    result = (gradient - unit * (tl.sum(unit * gradient, axis=0) / width)) * factor
    if HAS_TOTAL:
        result += tl.load(for_total_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + places, result.to(output_ptr.dtype.element_ty), mask=inside)


def add_norm(hidden: Tensor, addition: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden + addition, its norm, both [.., width], and the factor fp32 of each row. All are contiguous.

    Without addition the first result is hidden itself.
    """
    width = hidden.shape[-1]
    total = hidden if addition is None else torch.empty_like(hidden)
    normed = torch.empty_like(hidden)
    factors = torch.empty(hidden.numel() // width, dtype=torch.float32, device=hidden.device)
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(factors.shape[0],)](
        hidden,
        addition if addition is not None else hidden,
        weight,
        total,
        normed,
        factors,
        width,
        eps,
        HAS_ADDITION=addition is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return total, normed, factors


def add_norm_backward(
    total: Tensor, weight: Tensor, factors: Tensor, for_normed: Tensor, for_total: Tensor | None
) -> Tensor:
    """Return the gradient of hidden and of addition, given those of both results of `add_norm`. All are contiguous."""
    width = total.shape[-1]
    output = torch.empty_like(total)
    block = triton.next_power_of_2(width)
    _add_norm_backward_kernel[(factors.shape[0],)](
        total,
        weight,
        factors,
        for_normed,
        for_total if for_total is not None else for_normed,
        output,
        width,
        HAS_TOTAL=for_total is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return output

"""Triton kernels of cross_entropy.py. Import only on machines with a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _cross_entropy_kernel(logits_ptr, labels_ptr, losses_ptr, sums_ptr, width, BLOCK: tl.constexpr):
    """Compute one token: its loss, and the logarithm of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    largest = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * width + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger), axis=0)
        largest = larger
    label = tl.load(labels_ptr + row)
    exists = (label >= 0) & (label < width)
    chosen = tl.load(logits_ptr + row * width + label, mask=exists, other=0.0).to(tl.float32)
    logarithm = tl.log(total)
    tl.store(losses_ptr + row, logarithm - tl.where(exists, chosen - largest, 0.0))
    tl.store(sums_ptr + row, largest + logarithm)


@triton.jit
def _cross_entropy_backward_kernel(
    logits_ptr, labels_ptr, sums_ptr, gradient_ptr, output_ptr, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    logits = tl.load(logits_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.exp(logits - tl.load(sums_ptr + row)) - tl.where(columns == tl.load(labels_ptr + row), 1.0, 0.0)
    result = (slope * tl.load(gradient_ptr + row)).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + row * width + columns, result, mask=inside)


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and logarithms of sums, fp32 [tokens], for contiguous logits [tokens, vocabulary]."""
    tokens, width = logits.shape
    losses, sums = torch.empty(2, tokens, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(tokens,)](logits, labels, losses, sums, width, BLOCK=BLOCK, num_warps=8)
    return losses, sums


def backward(logits: Tensor, labels: Tensor, sums: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the logits, given that of the losses. All inputs are contiguous."""
    tokens, width = logits.shape
    output = torch.empty_like(logits)
    _cross_entropy_backward_kernel[(tokens, triton.cdiv(width, BLOCK))](
        logits, labels, sums, gradient, output, width, BLOCK=BLOCK, num_warps=8
    )
    return output

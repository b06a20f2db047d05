"""Triton kernels of permute.py. Imported only where a GPU is. A program takes one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _add_rows_kernel(rows_ptr, weights_ptr, position_ptr, output_ptr, hidden, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        row = tl.load(position_ptr + token * TOPK + choice)
        weight = tl.load(weights_ptr + token * TOPK + choice)
        total += weight * tl.load(rows_ptr + row * hidden + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + token * hidden + columns, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _spread_kernel(
    gradient_ptr,
    rows_ptr,
    weights_ptr,
    position_ptr,
    for_rows_ptr,
    for_weights_ptr,
    hidden,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for choice in tl.static_range(TOPK):
        row = tl.load(position_ptr + token * TOPK + choice)
        weight = tl.load(weights_ptr + token * TOPK + choice)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            gradient = tl.load(gradient_ptr + token * hidden + columns, mask=mask, other=0.0).to(tl.float32)
            value = tl.load(rows_ptr + row * hidden + columns, mask=mask, other=0.0).to(tl.float32)
            target = for_rows_ptr + row * hidden + columns
            tl.store(target, (gradient * weight).to(for_rows_ptr.dtype.element_ty), mask=mask)
            total += gradient * value
        tl.store(for_weights_ptr + token * TOPK + choice, tl.sum(total, axis=0))


def add_rows(rows: Tensor, weights: Tensor, position: Tensor) -> Tensor:
    """See permute._add_rows. rows contiguous, weights fp32, position int64."""
    tokens, topk = weights.shape
    hidden = rows.shape[1]
    output = torch.empty(tokens, hidden, dtype=rows.dtype, device=rows.device)
    grid = (tokens, triton.cdiv(hidden, BLOCK))
    _add_rows_kernel[grid](rows, weights.contiguous(), position, output, hidden, TOPK=topk, BLOCK=BLOCK)
    return output


def spread(gradient: Tensor, rows: Tensor, weights: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `add_rows` for its rows and its weights."""
    tokens, topk = weights.shape
    for_rows = torch.empty_like(rows)
    for_weights = torch.empty(tokens, topk, dtype=torch.float32, device=rows.device)
    _spread_kernel[(tokens,)](
        gradient, rows, weights.contiguous(), position, for_rows, for_weights, rows.shape[1], TOPK=topk, BLOCK=BLOCK
    )
    return for_rows, for_weights


@triton.jit
def _row_products_kernel(first_ptr, second_ptr, output_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        first = tl.load(first_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        total += first * tl.load(second_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + row, tl.sum(total, axis=0))


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """See shares.row_products. Both contiguous."""
    rows, width = first.shape
    output = torch.empty(rows, dtype=torch.float32, device=first.device)
    _row_products_kernel[(rows,)](first, second, output, width, BLOCK=BLOCK)
    return output

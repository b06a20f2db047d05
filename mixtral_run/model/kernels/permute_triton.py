"""Triton kernels of dispatch/permute.py; a program computes one token. Import only on machines with a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _add_rows_kernel(
    rows_ptr,
    probs_ptr,
    inverse_ptr,
    end_ptr,
    residual_ptr,
    output_ptr,
    hidden,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        row = tl.load(inverse_ptr + token * TOPK + choice)
        exists = mask & (row < tl.load(end_ptr)) if HAS_END else mask
        value = tl.load(rows_ptr + row * hidden + columns, mask=exists, other=0.0).to(tl.float32)
        if HAS_PROBS:
            total += tl.load(probs_ptr + token * TOPK + choice) * value
        else:
            total += value
    places = token * hidden + columns
    result = total.to(output_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
        result = (residual + result.to(tl.float32)).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + places, result, mask=mask)


@triton.jit
def _spread_kernel(
    gradient_ptr,
    rows_ptr,
    probs_ptr,
    inverse_ptr,
    end_ptr,
    for_rows_ptr,
    for_probs_ptr,
    hidden,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_END: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for choice in tl.static_range(TOPK):
        row = tl.load(inverse_ptr + token * TOPK + choice)
        prob = tl.load(probs_ptr + token * TOPK + choice)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            gradient = tl.load(gradient_ptr + token * hidden + columns, mask=mask, other=0.0).to(tl.float32)
            target = for_rows_ptr + row * hidden + columns
            exists = mask & (row < tl.load(end_ptr)) if HAS_END else mask
            tl.store(target, (gradient * prob).to(for_rows_ptr.dtype.element_ty), mask=exists)
            if HAS_ROWS:
                value = tl.load(rows_ptr + row * hidden + columns, mask=exists, other=0.0).to(tl.float32)
                total += gradient * value
        if HAS_ROWS:
            tl.store(for_probs_ptr + token * TOPK + choice, tl.sum(total, axis=0))


def add_rows(
    rows: Tensor,
    probs: Tensor | None,
    inverse: Tensor,
    topk: int,
    end: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute permute.add_rows. rows are contiguous, probs fp32, inverse int64."""
    tokens, hidden = inverse.numel() // topk, rows.shape[1]
    output = torch.empty(tokens, hidden, dtype=rows.dtype, device=rows.device)
    grid = (tokens, triton.cdiv(hidden, BLOCK))
    _add_rows_kernel[grid](
        rows,
        probs.contiguous() if probs is not None else rows,
        inverse,
        end if end is not None else inverse,
        residual.contiguous() if residual is not None else rows,
        output,
        hidden,
        TOPK=topk,
        BLOCK=BLOCK,
        HAS_PROBS=probs is not None,
        HAS_END=end is not None,
        HAS_RESIDUAL=residual is not None,
    )
    return output


def spread(
    gradient: Tensor,
    rows: Tensor | None,
    probs: Tensor,
    inverse: Tensor,
    num_rows: int,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `add_rows` for its rows, [num_rows, hidden], and, if rows are given, for its probs."""
    tokens, topk = probs.shape
    for_rows = torch.empty(num_rows, gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    for_probs = None
    if rows is not None:
        for_probs = torch.empty(tokens, topk, dtype=torch.float32, device=gradient.device)
    unused = for_rows
    _spread_kernel[(tokens,)](
        gradient,
        rows if rows is not None else unused,
        probs.contiguous(),
        inverse,
        end if end is not None else inverse,
        for_rows,
        for_probs if for_probs is not None else unused,
        gradient.shape[1],
        TOPK=topk,
        BLOCK=BLOCK,
        HAS_ROWS=rows is not None,
        HAS_END=end is not None,
    )
    return for_rows, for_probs


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
    """Compute router_probs.row_products. Both inputs are contiguous."""
    rows, width = first.shape
    output = torch.empty(rows, dtype=torch.float32, device=first.device)
    _row_products_kernel[(rows,)](first, second, output, width, BLOCK=BLOCK)
    return output


@triton.jit
def _mix_rows_kernel(factors_ptr, rows_ptr, output_ptr, width, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for number in tl.static_range(COUNT):
        factor = tl.load(factors_ptr + token * COUNT + number)
        total += factor * tl.load(rows_ptr + number * width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + token * width + columns, total.to(output_ptr.dtype.element_ty), mask=mask)


def mix_rows(factors: Tensor, rows: Tensor) -> Tensor:
    """Return factors fp32 [tokens, n] · rows [n, width] for small n, summed in fp32: [tokens, width] in rows' dtype."""
    tokens, count = factors.shape
    width = rows.shape[1]
    output = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    _mix_rows_kernel[(tokens, triton.cdiv(width, BLOCK))](factors, rows, output, width, COUNT=count, BLOCK=BLOCK)
    return output

"""Triton kernels of dispatch/symmetric_memory.py, which read rows from the memory of the other GPUs of a group.

`pointers`, int64 [p] on the device, are the addresses of one region on every rank. Import this module only on machines
with a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.sort_triton import Routes

BLOCK = 1024


@triton.jit
def _fetch_kernel(
    pointers_ptr,
    source_ptr,
    row_probs_ptr,
    end_ptr,
    output_ptr,
    tokens,
    hidden,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end_ptr):
        token = tl.load(source_ptr + row)
        kind = output_ptr.dtype.element_ty
        source = tl.load(pointers_ptr + token // tokens).to(tl.pointer_type(kind))
        # Regions are aligned; the compiler cannot know that of loaded pointers.
        source = tl.multiple_of(source, 16) + (token % tokens).to(tl.int64) * hidden
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            values = tl.load(source + columns, mask=mask)
            if WEIGHTED:
                values = (values.to(tl.float32) * tl.load(row_probs_ptr + row)).to(kind)
            tl.store(output_ptr + row * hidden + columns, values, mask=mask)


@triton.jit
def _put_kernel(rows_ptr, end_ptr, target_ptr, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end_ptr):
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            tl.store(
                target_ptr + row * hidden + columns, tl.load(rows_ptr + row * hidden + columns, mask=mask), mask=mask
            )


@triton.jit
def _sum_kernel(
    pointers_ptr,
    experts_ptr,
    inverse_ptr,
    starts_ptr,
    probs_ptr,
    output_ptr,
    hidden,
    num_rows,
    EACH: tl.constexpr,
    TOPK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        owner = tl.load(experts_ptr + token * TOPK + choice) // EACH
        row = tl.load(inverse_ptr + token * TOPK + choice) - tl.load(starts_ptr + owner)
        source = tl.load(pointers_ptr + owner).to(tl.pointer_type(output_ptr.dtype.element_ty))
        source = tl.multiple_of(source, 16) + row.to(tl.int64) * hidden
        value = tl.load(source + columns, mask=mask & (row < num_rows), other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(probs_ptr + token * TOPK + choice)
        total += value
    tl.store(output_ptr + token * hidden + columns, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pick_kernel(
    pointers_ptr,
    experts_ptr,
    inverse_ptr,
    starts_ptr,
    output_ptr,
    length,
    num_rows,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < length
    owner = tl.load(experts_ptr + places, mask=mask, other=0) // EACH
    row = tl.load(inverse_ptr + places, mask=mask, other=0) - tl.load(starts_ptr + owner)
    source = tl.load(pointers_ptr + owner).to(tl.pointer_type(tl.float32)) + row
    tl.store(output_ptr + places, tl.load(source, mask=mask & (row < num_rows), other=0.0), mask=mask)


def fetch(pointers: Tensor, routes: Routes, tokens: int, like: Tensor, *, weighted: bool) -> Tensor:
    """Read the rows of this process's experts from the tokens [t, h] of all ranks.

    tokens: t. weighted: multiply each row by its routing probability. Returns [rows, h], valid up to the last of
    `routes.offsets`, in the dtype and width of `like`.
    """
    num_rows, hidden = routes.source.numel(), like.shape[1]
    output = torch.empty(num_rows, hidden, dtype=like.dtype, device=like.device)
    _fetch_kernel[(num_rows,)](
        pointers,
        routes.source,
        routes.row_probs,
        routes.offsets[-1:],
        output,
        tokens,
        hidden,
        WEIGHTED=weighted,
        BLOCK=BLOCK,
    )
    return output


def put(rows: Tensor, routes: Routes, target: Tensor) -> None:
    """Copy rows [rows, h] to target, up to the last of `routes.offsets`."""
    _put_kernel[(rows.shape[0],)](rows, routes.offsets[-1:], target, rows.shape[1], BLOCK=BLOCK)


def sum_rows(pointers: Tensor, routes: Routes, own: slice, probs: Tensor | None, like: Tensor) -> Tensor:
    """Return for each token of this process the sum, in fp32, of its rows, wherever they are: [t, h].

    pointers: rows [rows, h] on every rank. own: this process's tokens among all. probs: fp32 [t, topk], factors of the
    rows; None for ones. like: a tensor of the rows' shape and dtype.
    """
    experts, inverse = routes.experts[own], routes.inverse[own]
    (tokens, topk), (num_rows, hidden) = experts.shape, like.shape
    output = torch.empty(tokens, hidden, dtype=like.dtype, device=like.device)
    _sum_kernel[(tokens, triton.cdiv(hidden, BLOCK))](
        pointers,
        experts,
        inverse,
        routes.starts,
        probs if probs is not None else routes.row_probs,
        output,
        hidden,
        num_rows,
        EACH=routes.offsets.numel(),
        TOPK=topk,
        WEIGHTED=probs is not None,
        BLOCK=BLOCK,
    )
    return output


def pick(pointers: Tensor, routes: Routes, own: slice) -> Tensor:
    """Read a number fp32 of each choice of this process's tokens, [t, topk]. pointers: numbers [rows] on every rank."""
    experts, inverse = routes.experts[own], routes.inverse[own]
    output = torch.empty(experts.shape, dtype=torch.float32, device=experts.device)
    length = experts.numel()
    _pick_kernel[(triton.cdiv(length, BLOCK),)](
        pointers,
        experts,
        inverse,
        routes.starts,
        output,
        length,
        routes.source.numel(),
        EACH=routes.offsets.numel(),
        BLOCK=BLOCK,
    )
    return output

"""Triton kernels of swiglu.py. Import this module only on machines with a GPU.

A program computes BLOCK_M rows and BLOCK_F columns. Rows are sorted by expert and an expert may end within a block: a
program visits all experts of its rows and adds each expert's adapter output to that expert's rows only. Rows at or
after the last offset belong to no expert (dispatch/all_gather.py) and are neither read nor written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 32
BLOCK_F = 128
"""Small, since the registers that a program uses decide how many programs run at a time."""


@triton.jit
def _adapter(
    inner_ptr,
    outer_ptr,
    offsets_ptr,
    rows,
    row_mask,
    columns,
    limit,
    ffn,
    NUM_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Return inner · outerᵀ for gate and up, each [BLOCK_M, BLOCK_F], fp32.

    The caller adds the layer's own output afterwards; as the start of the sum it would have to be loaded first.
    """
    gate = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    ranks = tl.arange(0, RANK)
    inner = tl.load(inner_ptr + rows[:, None] * RANK + ranks[None, :], mask=row_mask[:, None], other=0.0)
    first = tl.program_id(0) * BLOCK_M
    last = tl.minimum(first + BLOCK_M, limit)
    # The experts of the first and of the last row; most blocks have rows of one expert only.
    numbers = tl.arange(0, NUM_EXPERTS)
    offsets = tl.load(offsets_ptr + numbers)
    first_expert = tl.sum((offsets <= first).to(tl.int32), axis=0)
    last_expert = tl.sum((offsets <= last - 1).to(tl.int32), axis=0)
    for expert in range(first_expert, last_expert + 1):
        end = tl.load(offsets_ptr + expert)
        begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
        mine = (rows >= begin) & (rows < end)
        part = tl.where(mine[:, None], inner, 0.0).to(inner.dtype)
        base = outer_ptr + expert * (2 * ffn * RANK)
        gate_outer = tl.load(base + columns[None, :] * RANK + ranks[:, None])
        up_outer = tl.load(base + (ffn + columns[None, :]) * RANK + ranks[:, None])
        gate = tl.dot(part, gate_outer, gate)
        up = tl.dot(part, up_outer, up)
    return gate, up


@triton.jit(do_not_specialize=("tokens",))
def _forward_kernel(
    hidden_ptr,
    inner_ptr,
    outer_ptr,
    offsets_ptr,
    output_ptr,
    tokens,
    ffn,
    scale,
    NUM_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    limit = tl.minimum(tl.load(offsets_ptr + NUM_EXPERTS - 1), tokens)
    if tl.program_id(0) * BLOCK_M >= limit:
        return
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row_mask = rows < limit
    places = rows[:, None].to(tl.int64) * (2 * ffn) + columns[None, :]
    gate = tl.load(hidden_ptr + places, mask=row_mask[:, None], other=0.0)
    up = tl.load(hidden_ptr + places + ffn, mask=row_mask[:, None], other=0.0)
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    if RANK > 0:
        adapter_gate, adapter_up = _adapter(
            inner_ptr,
            outer_ptr,
            offsets_ptr,
            rows,
            row_mask,
            columns,
            limit,
            ffn,
            NUM_EXPERTS,
            RANK,
            BLOCK_M,
            BLOCK_F,
        )
        gate += adapter_gate * scale
        up += adapter_up * scale
    output = gate * tl.sigmoid(gate) * up
    target = output_ptr + rows[:, None].to(tl.int64) * ffn + columns[None, :]
    tl.store(target, output.to(output_ptr.dtype.element_ty), mask=row_mask[:, None])


@triton.jit(do_not_specialize=("tokens",))
def _backward_kernel(
    hidden_ptr,
    inner_ptr,
    outer_ptr,
    offsets_ptr,
    gradient_ptr,
    for_hidden_ptr,
    active_ptr,
    products_ptr,
    tokens,
    ffn,
    scale,
    NUM_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    limit = tl.minimum(tl.load(offsets_ptr + NUM_EXPERTS - 1), tokens)
    if tl.program_id(0) * BLOCK_M >= limit:
        return
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row_mask = rows < limit
    places = rows[:, None].to(tl.int64) * (2 * ffn) + columns[None, :]
    gate = tl.load(hidden_ptr + places, mask=row_mask[:, None], other=0.0)
    up = tl.load(hidden_ptr + places + ffn, mask=row_mask[:, None], other=0.0)
    source = gradient_ptr + rows[:, None].to(tl.int64) * ffn + columns[None, :]
    gradient = tl.load(source, mask=row_mask[:, None], other=0.0)
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    if RANK > 0:
        adapter_gate, adapter_up = _adapter(
            inner_ptr,
            outer_ptr,
            offsets_ptr,
            rows,
            row_mask,
            columns,
            limit,
            ffn,
            NUM_EXPERTS,
            RANK,
            BLOCK_M,
            BLOCK_F,
        )
        gate += adapter_gate * scale
        up += adapter_up * scale
    gradient = gradient.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    for_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    for_up = gradient * gate * sigmoid
    if RECOMPUTE:
        active = gate * sigmoid * up
        target = active_ptr + rows[:, None].to(tl.int64) * ffn + columns[None, :]
        tl.store(target, active.to(active_ptr.dtype.element_ty), mask=row_mask[:, None])
        products = products_ptr + tl.program_id(1).to(tl.int64) * tokens + rows
        tl.store(products, tl.sum(active * gradient, axis=1), mask=row_mask)
    kind = for_hidden_ptr.dtype.element_ty
    tl.store(for_hidden_ptr + places, for_gate.to(kind), mask=row_mask[:, None])
    tl.store(for_hidden_ptr + places + ffn, for_up.to(kind), mask=row_mask[:, None])


def forward(hidden: Tensor, inner: Tensor | None, outer: Tensor | None, scale: float, offsets: Tensor) -> Tensor:
    """Compute swiglu.swiglu_with_adapter, or swiglu.swiglu without inner and outer. All inputs are contiguous and of
    one dtype.
    """
    tokens, ffn = hidden.shape[0], hidden.shape[1] // 2
    output = torch.empty(tokens, ffn, dtype=hidden.dtype, device=hidden.device)
    _launch(_forward_kernel, hidden, inner, outer, offsets, output, tokens, ffn, scale)
    return output


def backward(
    hidden: Tensor, inner: Tensor | None, outer: Tensor | None, scale: float, offsets: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of hidden, given that of the output [tokens, ffn]."""
    for_hidden = torch.empty_like(hidden)
    _backward(hidden, inner, outer, scale, offsets, gradient, for_hidden, None, None)
    return for_hidden


def recomputing_backward(
    hidden: Tensor, inner: Tensor, outer: Tensor, scale: float, offsets: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of hidden, the recomputed output, and each row's scalar product of output and gradient."""
    tokens, ffn = gradient.shape
    for_hidden, active = torch.empty_like(hidden), torch.empty_like(gradient)
    products = torch.empty(ffn // BLOCK_F, tokens, dtype=torch.float32, device=hidden.device)
    _backward(hidden, inner, outer, scale, offsets, gradient, for_hidden, active, products)
    return for_hidden, active, products.sum(0)


def _backward(
    hidden: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
    scale: float,
    offsets: Tensor,
    gradient: Tensor,
    for_hidden: Tensor,
    active: Tensor | None,
    products: Tensor | None,
) -> None:
    tokens, ffn = gradient.shape
    unused = for_hidden
    results = (for_hidden, active if active is not None else unused, products if products is not None else unused)
    arguments = (gradient, *results, tokens, ffn, scale)
    _launch(_backward_kernel, hidden, inner, outer, offsets, *arguments, RECOMPUTE=active is not None)


def _launch(
    kernel: Any,
    hidden: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
    offsets: Tensor,
    *arguments: Any,
    **kinds: bool,
) -> None:
    tokens, both = hidden.shape
    grid = (triton.cdiv(tokens, BLOCK_M), both // 2 // BLOCK_F)
    unused = hidden
    kernel[grid](
        hidden,
        inner if inner is not None else unused,
        outer if outer is not None else unused,
        offsets,
        *arguments,
        NUM_EXPERTS=offsets.shape[0],
        RANK=inner.shape[1] if inner is not None else 0,
        BLOCK_M=BLOCK_M,
        BLOCK_F=BLOCK_F,
        num_warps=4,
        **kinds,
    )

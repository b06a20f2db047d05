"""Triton kernels of swiglu.py. Import this module only on machines with a GPU.

A program computes one tile of rows and columns. Rows are sorted by expert, and no tile has rows of two experts: where
an expert's rows end within a tile, the tile ends with them. The program then needs one product with one expert's
matrix and no loop, and its few registers let many programs run at a time, which the memory needs. Rows at or after the
last offset belong to no expert (dispatch/all_gather.py) and are neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.quantized.formats import LARGEST, TINY
from mixtral_run.model.kernels.sort_triton import place_tile


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's tile, its warps, and whether neighboring programs have neighboring columns."""

    rows: int
    columns: int
    warps: int
    across: bool = True


SUMMED = 16
"""Rows of a program that sums products."""
FORWARD, BACKWARD = Tile(32, 128, 4), Tile(16, 128, 4)


@triton.jit
def _sigmoid(value):
    """Return 1 / (1 + exp(-value)) of fp32 in four instructions.

    Those of tl.sigmoid also treat results below 1e-38, at four times the instructions; here such a result is 0.
    """
    return tl.inline_asm_elementwise(
        "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
        "=&f,f",
        [value],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _rounded(value):
    """Return fp32 numbers in bf16, two an instruction: a conversion whose result is also read goes one by one."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [value], dtype=tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def _adapter_halves(inner_ptr, outer_ptr, expert, rows, row_mask, columns, ffn, RANK: tl.constexpr):
    """Load inner of the rows [ROWS, RANK], and outer of the expert for gate and up columns, each [RANK, COLUMNS]."""
    ranks = tl.arange(0, RANK)
    inner = tl.load(inner_ptr + rows[:, None] * RANK + ranks[None, :], mask=row_mask[:, None], other=0.0)
    outer = outer_ptr + expert.to(tl.int64) * (2 * ffn * RANK) + columns[None, :] * RANK + ranks[:, None]
    return inner, tl.load(outer), tl.load(outer + ffn * RANK)


@triton.jit(do_not_specialize=("tokens",))
def _swiglu_kernel(
    hidden_ptr,
    inner_ptr,
    outer_ptr,
    offsets_ptr,
    output_ptr,
    tokens,
    ffn,
    scale,
    num_experts,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    expert, first, end = place_tile(offsets_ptr, tokens, tl.program_id(1 if ACROSS else 0), num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    local = tl.arange(0, ROWS)
    columns = tl.program_id(0 if ACROSS else 1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = first + local < end
    inside = row_mask[:, None]
    source = hidden_ptr + first.to(tl.int64) * (2 * ffn) + (local[:, None] * (2 * ffn) + columns[None, :])
    # All loads come before the first use of one, which waits.
    gate = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + ffn, mask=inside, other=0.0)
    if RANK > 0:
        inner, outer_gate, outer_up = _adapter_halves(
            inner_ptr, outer_ptr, expert, first + local, row_mask, columns, ffn, RANK
        )
        gate = gate.to(tl.float32) + tl.dot(inner, outer_gate) * scale
        up = up.to(tl.float32) + tl.dot(inner, outer_up) * scale
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    output = gate * _sigmoid(gate) * up
    target = output_ptr + first.to(tl.int64) * ffn + (local[:, None] * ffn + columns[None, :])
    tl.store(target, _rounded(output), mask=inside)


@triton.jit(do_not_specialize=("tokens",))
def _swiglu_backward_kernel(
    hidden_ptr,
    inner_ptr,
    outer_ptr,
    offsets_ptr,
    gradient_ptr,
    for_hidden_ptr,
    active_ptr,
    products_ptr,
    factors_ptr,
    largest_ptr,
    tokens,
    ffn,
    scale,
    num_experts,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACROSS: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
):
    expert, first, end = place_tile(offsets_ptr, tokens, tl.program_id(1 if ACROSS else 0), num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    block = tl.program_id(0 if ACROSS else 1)
    local = tl.arange(0, ROWS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = first + local < end
    inside = row_mask[:, None]
    wide = first.to(tl.int64) * (2 * ffn) + (local[:, None] * (2 * ffn) + columns[None, :])
    narrow = first.to(tl.int64) * ffn + (local[:, None] * ffn + columns[None, :])
    gate = tl.load(hidden_ptr + wide, mask=inside, other=0.0)
    up = tl.load(hidden_ptr + wide + ffn, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + narrow, mask=inside, other=0.0)
    if RANK > 0:
        inner, outer_gate, outer_up = _adapter_halves(
            inner_ptr, outer_ptr, expert, first + local, row_mask, columns, ffn, RANK
        )
        gate = gate.to(tl.float32) + tl.dot(inner, outer_gate) * scale
        up = up.to(tl.float32) + tl.dot(inner, outer_up) * scale
    gate, up, gradient = gate.to(tl.float32), up.to(tl.float32), gradient.to(tl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    for_up = _rounded(gradient * silu)
    tl.store(for_hidden_ptr + wide + ffn, for_up, mask=inside)
    for_gate = _rounded(gradient * up * (sigmoid + silu * (1.0 - sigmoid)))
    tl.store(for_hidden_ptr + wide, for_gate, mask=inside)
    part = block.to(tl.int64) * tokens + (first + local)
    if HAS_FACTORS:
        factors = factors_ptr + expert.to(tl.int64) * (2 * ffn) + columns
        scaled_gate = tl.abs(for_gate.to(tl.float32) * tl.load(factors)[None, :])
        scaled_up = tl.abs(for_up.to(tl.float32) * tl.load(factors + ffn)[None, :])
        tl.store(largest_ptr + part, tl.max(tl.maximum(scaled_gate, scaled_up), axis=1), mask=row_mask)
    if RECOMPUTE:
        active = silu * up
        tl.store(active_ptr + narrow, _rounded(active), mask=inside)
        tl.store(products_ptr + part, tl.sum(active * gradient, axis=1), mask=row_mask)


@triton.jit(do_not_specialize=("tokens",))
def _over_blocks_kernel(
    products_ptr,
    probs_ptr,
    order_ptr,
    output_ptr,
    largest_ptr,
    scales_ptr,
    tokens,
    num_blocks,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
):
    """Sum the products of all blocks of columns, over the probabilities; find the scales for the largest numbers.

    order: where each row's probability and result are.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    blocks = tl.arange(0, BLOCKS)
    there = (blocks < num_blocks)[:, None] & (rows < tokens)[None, :]
    places = blocks[:, None].to(tl.int64) * tokens + rows[None, :]
    result = tl.sum(tl.load(products_ptr + places, mask=there, other=0.0), axis=0)
    index = rows
    if HAS_ORDER:
        index = tl.load(order_ptr + rows, mask=rows < tokens, other=0)
    if HAS_PROBS:
        probs = tl.load(probs_ptr + index, mask=rows < tokens, other=0.0)
        result = tl.where(probs > 0, result / probs, 0.0)
    tl.store(output_ptr + index, result, mask=rows < tokens)
    if HAS_FACTORS:
        largest = tl.max(tl.load(largest_ptr + places, mask=there, other=0.0), axis=0)
        tl.store(scales_ptr + rows, tl.maximum(largest, TINY) / LARGEST, mask=rows < tokens)


def forward(hidden: Tensor, inner: Tensor | None, outer: Tensor | None, scale: float, offsets: Tensor) -> Tensor:
    """Compute swiglu.swiglu_with_adapter, or swiglu.swiglu without inner and outer. All inputs are contiguous and of
    one dtype.
    """
    tokens, ffn = hidden.shape[0], hidden.shape[1] // 2
    output = torch.empty(tokens, ffn, dtype=hidden.dtype, device=hidden.device)
    _launch(_swiglu_kernel, FORWARD, hidden, inner, outer, offsets, output, tokens, ffn, scale)
    return output


def backward(
    hidden: Tensor, inner: Tensor | None, outer: Tensor | None, scale: float, offsets: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of hidden, given that of the output [tokens, ffn]."""
    for_hidden = torch.empty_like(hidden)
    unused = [for_hidden] * 4
    arguments = (gradient, for_hidden, *unused, *gradient.shape, scale)
    _launch(
        _swiglu_backward_kernel, BACKWARD, hidden, inner, outer, offsets, *arguments, RECOMPUTE=False, HAS_FACTORS=False
    )
    return for_hidden


def recomputing_backward(
    hidden: Tensor,
    inner: Tensor,
    outer: Tensor,
    scale: float,
    offsets: Tensor,
    gradient: Tensor,
    probs: Tensor | None = None,
    factors: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute swiglu.recomputing_backward."""
    tokens, ffn = gradient.shape
    for_hidden, active = torch.empty_like(hidden), torch.empty_like(gradient)
    blocks = ffn // BACKWARD.columns
    products, largest = torch.empty(2, blocks, tokens, dtype=torch.float32, device=hidden.device)
    result, scales = torch.empty(2, tokens, dtype=torch.float32, device=hidden.device)
    unused = products
    arguments = (gradient, for_hidden, active, products, factors if factors is not None else unused, largest)
    _launch(
        _swiglu_backward_kernel,
        BACKWARD,
        hidden,
        inner,
        outer,
        offsets,
        *arguments,
        tokens,
        ffn,
        scale,
        RECOMPUTE=True,
        HAS_FACTORS=factors is not None,
    )
    _over_blocks_kernel[(triton.cdiv(tokens, SUMMED),)](
        products,
        probs.contiguous() if probs is not None else unused,
        order if order is not None else unused,
        result,
        largest,
        scales,
        tokens,
        blocks,
        BLOCKS=triton.next_power_of_2(blocks),
        ROWS=SUMMED,
        HAS_PROBS=probs is not None,
        HAS_ORDER=order is not None,
        HAS_FACTORS=factors is not None,
        LARGEST=LARGEST,
        TINY=TINY,
    )
    if probs is not None and order is not None:
        result = result.view(probs.shape)
    return for_hidden, active, result, scales if factors is not None else None


def _launch(
    kernel: Any,
    tile: Tile,
    hidden: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
    offsets: Tensor,
    *arguments: Any,
    **kinds: bool,
) -> None:
    tokens, both = hidden.shape
    experts = offsets.shape[0]
    # Each expert's last tile may be partly empty.
    row_tiles = triton.cdiv(tokens, tile.rows) + experts - 1
    grid = (row_tiles, both // 2 // tile.columns)
    unused = hidden
    kernel[grid[::-1] if tile.across else grid](
        hidden,
        inner if inner is not None else unused,
        outer if outer is not None else unused,
        offsets,
        *arguments,
        experts,
        EXPERTS=triton.next_power_of_2(experts),
        RANK=inner.shape[1] if inner is not None else 0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        ACROSS=tile.across,
        num_warps=tile.warps,
        **kinds,
    )

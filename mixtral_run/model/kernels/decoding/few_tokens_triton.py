"""Triton kernels of few_tokens.py. Import only on machines with a GPU.

With one token the time is that of reading the weights: a program multiplies few of a matrix's rows, each read once, and
many programs run at a time. Sums are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.decoding.halves import Halves
from mixtral_run.model.kernels.decoding.one_adapter_triton import from_adapter, inner_of_one

COLUMNS = 1024
"""Columns of a token that a program copies."""


@dataclass(frozen=True)
class Tile:
    """Rows of the weight of a program, columns that it reads at a time, its warps, and slices that it reads ahead."""

    rows: int
    depth: int
    warps: int
    stages: int = 1


GATED, SUMMED, SINGLE = Tile(4, 1024, 4), Tile(4, 512, 4), Tile(4, 512, 4)
"""Tiles of the experts' first product, of their second, and of a product with one matrix."""


def depth_of(tile: Tile, width: int) -> int:
    """Return how many columns of a row of this width a program reads at a time: the largest power of 2 in it."""
    return min(tile.depth, width & -width)


@triton.jit
def _route_kernel(
    tokens_ptr,
    weight_ptr,
    probs_ptr,
    experts_ptr,
    count,
    HIDDEN: tl.constexpr,
    TOPK: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, COUNT)
    there = numbers < count
    parts = tl.zeros([COUNT, DEPTH], dtype=tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        values = tl.load(tokens_ptr + token * HIDDEN + columns).to(tl.float32)
        weights = tl.load(weight_ptr + numbers[:, None] * HIDDEN + columns[None, :], mask=there[:, None], other=0.0)
        parts += weights.to(tl.float32) * values[None, :]
    logits = tl.where(there, tl.sum(parts, axis=1), float("-inf"))
    largest = tl.max(logits, axis=0)
    left = logits
    total = 0.0
    for choice in tl.static_range(TOPK):
        # If no logit is a number, the experts must exist all the same.
        expert = tl.minimum(tl.argmax(left, axis=0), count - 1)
        mine = numbers == expert
        total += tl.exp(tl.sum(tl.where(mine, logits, 0.0), axis=0) - largest)
        left = tl.where(mine, float("-inf"), left)
        tl.store(experts_ptr + token * TOPK + choice, expert.to(tl.int64))
    left = logits
    for choice in tl.static_range(TOPK):
        expert = tl.minimum(tl.argmax(left, axis=0), count - 1)
        mine = numbers == expert
        prob = tl.exp(tl.sum(tl.where(mine, logits, 0.0), axis=0) - largest) / total
        left = tl.where(mine, float("-inf"), left)
        tl.store(probs_ptr + token * TOPK + choice, prob)


@triton.jit
def _sorted_rows_kernel(
    tokens_ptr,
    experts_ptr,
    rows_ptr,
    order_ptr,
    inverse_ptr,
    offsets_ptr,
    choices,
    hidden,
    count,
    TOPK: tl.constexpr,
    CHOICES: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    choice = tl.program_id(0)
    numbers = tl.arange(0, CHOICES)
    experts = tl.load(experts_ptr + numbers, mask=numbers < choices, other=COUNT)
    own = tl.load(experts_ptr + choice)
    before = (experts < own) | ((experts == own) & (numbers < choice))
    row = tl.sum(before.to(tl.int32), axis=0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < hidden
    values = tl.load(tokens_ptr + (choice // TOPK).to(tl.int64) * hidden + columns, mask=inside)
    tl.store(rows_ptr + row.to(tl.int64) * hidden + columns, values, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(order_ptr + row, choice.to(tl.int64))
        tl.store(inverse_ptr + choice, row.to(tl.int64))
        if choice == 0:
            all_experts = tl.arange(0, COUNT)
            ends = tl.sum((experts[None, :] <= all_experts[:, None]).to(tl.int32), axis=1)
            tl.store(offsets_ptr + all_experts, ends, mask=all_experts < count)


@triton.jit
def _gated_kernel(
    token_ptr,
    weight_ptr,
    experts_ptr,
    active_ptr,
    inner_ptr,
    half_ptr,
    half_stride,
    ffn,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    choice = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DEPTH)
    expert = tl.load(experts_ptr + choice)
    first = weight_ptr + expert * (2 * ffn * HIDDEN) + (rows[:, None].to(tl.int64) * HIDDEN + columns[None, :])
    second = first + ffn.to(tl.int64) * HIDDEN
    gates = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    ups = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    for start in tl.range(0, HIDDEN, DEPTH, num_stages=STAGES):
        gate = tl.load(first + start, eviction_policy="evict_first")
        up = tl.load(second + start, eviction_policy="evict_first")
        values = tl.load(token_ptr + start + columns).to(tl.float32)[None, :]
        gates += gate.to(tl.float32) * values
        ups += up.to(tl.float32) * values
    gate, up = tl.sum(gates, axis=1), tl.sum(ups, axis=1)
    if RANK > 0:
        half = half_ptr + expert * half_stride
        gate += from_adapter(inner_ptr + choice * RANK, half, rows, RANK, PADDED)
        up += from_adapter(inner_ptr + choice * RANK, half, rows + ffn, RANK, PADDED)
    active = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(active_ptr + choice * ffn + rows, active.to(active_ptr.dtype.element_ty))


@triton.jit
def _summed_kernel(
    active_ptr,
    weight_ptr,
    experts_ptr,
    probs_ptr,
    output_ptr,
    inner_ptr,
    half_ptr,
    half_stride,
    hidden,
    FFN: tl.constexpr,
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DEPTH)
    places = rows[:, None].to(tl.int64) * FFN + columns[None, :]
    each = hidden.to(tl.int64) * FFN
    sums = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    for start in tl.range(0, FFN, DEPTH, num_stages=STAGES):
        for choice in tl.static_range(TOPK):
            expert = tl.load(experts_ptr + choice)
            weights = tl.load(weight_ptr + expert * each + places + start, eviction_policy="evict_first")
            values = tl.load(active_ptr + choice * FFN + start + columns).to(tl.float32)
            sums += weights.to(tl.float32) * (values * tl.load(probs_ptr + choice))[None, :]
    total = tl.sum(sums, axis=1)
    if RANK > 0:
        for choice in tl.static_range(TOPK):
            half = half_ptr + tl.load(experts_ptr + choice) * half_stride
            added = from_adapter(inner_ptr + choice * RANK, half, rows, RANK, PADDED)
            total += added * tl.load(probs_ptr + choice)
    tl.store(output_ptr + rows, total.to(output_ptr.dtype.element_ty))


@triton.jit
def _single_kernel(
    row_ptr,
    weight_ptr,
    output_ptr,
    inner_ptr,
    half_ptr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DEPTH)
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    sums = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    for start in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
        weights = tl.load(weight_ptr + places + start, eviction_policy="evict_first")
        sums += weights.to(tl.float32) * tl.load(row_ptr + start + columns).to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1)
    if RANK > 0:
        total += from_adapter(inner_ptr, half_ptr, rows, RANK, PADDED)
    tl.store(output_ptr + rows, total.to(output_ptr.dtype.element_ty))


def route(tokens: Tensor, weight: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Compute few_tokens.route. Both are contiguous."""
    count, hidden = weight.shape
    probs = torch.empty(tokens.shape[0], topk, dtype=torch.float32, device=tokens.device)
    experts = torch.empty(tokens.shape[0], topk, dtype=torch.int64, device=tokens.device)
    padded = triton.next_power_of_2(count)
    _route_kernel[(tokens.shape[0],)](
        tokens,
        weight,
        probs,
        experts,
        count,
        HIDDEN=hidden,
        TOPK=topk,
        COUNT=padded,
        DEPTH=max(16, min(hidden & -hidden, 8192 // padded)),
        num_warps=8,
    )
    return probs, experts


def sorted_rows(tokens: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute few_tokens.sorted_rows. Both are contiguous."""
    choices, hidden = experts.numel(), tokens.shape[1]
    rows = torch.empty(choices, hidden, dtype=tokens.dtype, device=tokens.device)
    order, inverse = (torch.empty(choices, dtype=torch.int64, device=tokens.device) for _ in range(2))
    offsets = torch.empty(count, dtype=torch.int32, device=tokens.device)
    _sorted_rows_kernel[(choices, triton.cdiv(hidden, COLUMNS))](
        tokens,
        experts,
        rows,
        order,
        inverse,
        offsets,
        choices,
        hidden,
        count,
        TOPK=experts.shape[1],
        CHOICES=triton.next_power_of_2(choices),
        COUNT=triton.next_power_of_2(count),
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return rows, order, inverse, offsets


def outputs_of_one(
    token: Tensor,
    experts: Tensor,
    probs: Tensor,
    first: Tensor,
    second: Tensor,
    adapters: tuple[Halves | None, Halves | None] = (None, None),
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """Compute few_tokens.outputs_of_one. All are contiguous."""
    gated, summed = tiles or (GATED, SUMMED)
    topk, hidden, ffn = experts.shape[1], second.shape[1], second.shape[2]
    active = torch.empty(topk, ffn, dtype=token.dtype, device=token.device)
    output = torch.empty(1, hidden, dtype=token.dtype, device=token.device)
    inner = inner_of_one(token, experts, adapters[0])
    _gated_kernel[(ffn // gated.rows, topk)](
        token,
        first,
        experts,
        active,
        *inner.pointers,
        ffn,
        HIDDEN=hidden,
        ROWS=gated.rows,
        DEPTH=depth_of(gated, hidden),
        STAGES=gated.stages,
        num_warps=gated.warps,
        **inner.sizes,
    )
    inner = inner_of_one(active, experts, adapters[1])
    _summed_kernel[(hidden // summed.rows,)](
        active,
        second,
        experts,
        probs,
        output,
        *inner.pointers,
        hidden,
        FFN=ffn,
        TOPK=topk,
        ROWS=summed.rows,
        DEPTH=depth_of(summed, ffn),
        STAGES=summed.stages,
        num_warps=summed.warps,
        **inner.sizes,
    )
    return output


def product_of_one(row: Tensor, weight: Tensor, adapter: Halves | None = None, tile: Tile = SINGLE) -> Tensor:
    """Return row [.., in], of one row, times the transpose of weight [out, in], with its adapter's part. Both are
    contiguous.
    """
    outputs, width = weight.shape
    output = torch.empty(*row.shape[:-1], outputs, dtype=row.dtype, device=row.device)
    inner = inner_of_one(row.view(1, -1), None, adapter)
    _single_kernel[(outputs // tile.rows,)](
        row,
        weight,
        output,
        *inner.pointers[:2],
        WIDTH=width,
        ROWS=tile.rows,
        DEPTH=depth_of(tile, width),
        STAGES=tile.stages,
        num_warps=tile.warps,
        **inner.sizes,
    )
    return output

"""Triton kernels for a stable counting sort of choices by expert, of one process or of a whole expert group.

A choice is token·topk + k. A program handles a block of choices: the first kernel counts each expert in the block; the
second, from the counts of all blocks, computes where each choice goes. Few choices of one process are sorted by one
kernel, whose programs count all of them. Among the choices of several processes, the rows of one process's experts are
consecutive, beginning at `starts` of that process; for its own rows a process also writes the routing probability.
Kernels whose tiles have rows of one expert find them by `place_tile`. Import this module only on machines with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
MOST_COUNTED = 2**14
"""A program of many experts handles fewer choices: choices times experts must fit into shared memory."""
MOST_AT_ONCE, FEW_EXPERTS = 8192, 16
"""Most choices, and most experts, that the single kernel sorts. A sum of counts must fit into 15 bits."""
ONES = tl.constexpr(0x0001000100010001)
"""One in each of four fields of 16 bits."""


@dataclass(frozen=True)
class Routes:
    """Routing of all tokens of an expert group, as one process needs it.

    source: int32 [rows], the token (among all) of each row of this process's experts, up to the last of `offsets`.
    row_probs: fp32 [rows], the routing probability of each row.
    offsets: int32 [own experts], the end of each expert's rows.
    inverse: int32 [p·t, topk], the index of every choice among the rows of all processes.
    starts: int32 [p], the index of each process's first row.
    experts: int32 [p·t, topk], the expert of every choice.
    """

    source: Tensor
    row_probs: Tensor
    offsets: Tensor
    inverse: Tensor
    starts: Tensor
    experts: Tensor


@triton.jit
def place_tile(offsets_ptr, tokens, row_tile, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return the expert of a tile of rows, its first row, and the end of the expert's rows; no tile: an end of 0.

    The last tiles come first: they were written last, by the product before this, and are in the cache still.
    """
    numbers = tl.arange(0, EXPERTS)
    there = numbers < num_experts
    ends = tl.minimum(tl.load(offsets_ptr + numbers, mask=there, other=0), tokens)
    begins = tl.minimum(tl.load(offsets_ptr + numbers - 1, mask=there & (numbers > 0), other=0), tokens)
    high = (ends - begins + ROWS - 1) // ROWS
    tiles_to = tl.cumsum(high, axis=0)
    tile = tl.sum(high, axis=0) - 1 - row_tile
    mine = (tiles_to > tile) & (tiles_to - high <= tile)
    expert = tl.sum(tl.where(mine, numbers, 0), axis=0)
    first = tl.sum(tl.where(mine, begins + (tile - (tiles_to - high)) * ROWS, 0), axis=0)
    end = tl.sum(tl.where(mine, ends, 0), axis=0)
    return expert, first, end


@triton.jit
def _count_kernel(
    probs_ptr,
    experts_ptr,
    all_probs_ptr,
    all_experts_ptr,
    counts_ptr,
    length,
    ALL_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    process = tl.program_id(0)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < length
    if ALL_RANKS:
        probs = tl.load(probs_ptr + process).to(tl.pointer_type(tl.float32))
        experts = tl.load(experts_ptr + process).to(tl.pointer_type(tl.int32))
        expert = tl.load(experts + places, mask=mask, other=-1)
        tl.store(all_probs_ptr + process * length + places, tl.load(probs + places, mask=mask), mask=mask)
        tl.store(all_experts_ptr + process * length + places, expert, mask=mask)
    else:
        expert = tl.load(experts_ptr + places, mask=mask, other=-1)
    numbers = tl.arange(0, NUM_EXPERTS)
    counts = tl.sum((expert[:, None] == numbers[None, :]).to(tl.int32), axis=0)
    block = process * tl.num_programs(1) + tl.program_id(1)
    tl.store(counts_ptr + block * NUM_EXPERTS + numbers, counts)


@triton.jit
def _place_kernel(
    probs_ptr,
    experts_ptr,
    counts_ptr,
    inverse_ptr,
    order_ptr,
    source_ptr,
    row_probs_ptr,
    offsets_ptr,
    starts_ptr,
    overflow_ptr,
    length,
    num_rows,
    first,
    num_experts,
    ALL_RANKS: tl.constexpr,
    EACH: tl.constexpr,
    TOPK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    numbers = tl.arange(0, NUM_EXPERTS)
    totals = tl.zeros([NUM_EXPERTS], dtype=tl.int32)
    before = tl.zeros([NUM_EXPERTS], dtype=tl.int32)
    for start in range(0, tl.num_programs(0) * tl.num_programs(1), BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        there = blocks[:, None] < tl.num_programs(0) * tl.num_programs(1)
        counts = tl.load(counts_ptr + blocks[:, None] * NUM_EXPERTS + numbers[None, :], mask=there, other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(blocks[:, None] < block, counts, 0), axis=0)
    offsets = tl.cumsum(totals, axis=0)
    begins = offsets - totals + before
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < length
    choices = tl.program_id(0) * length + places
    expert = tl.load(experts_ptr + choices, mask=mask, other=-1)
    chosen = (expert[:, None] == numbers[None, :]).to(tl.int32)
    inverse = tl.sum(chosen * (tl.cumsum(chosen, axis=0) - chosen + begins[None, :]), axis=1)
    tl.store(inverse_ptr + choices, inverse, mask=mask)
    if ALL_RANKS:
        skipped = tl.sum(tl.where(numbers < first, totals, 0), axis=0)
        row = inverse - skipped
        own = mask & (expert >= first) & (expert < first + EACH) & (row < num_rows)
        tl.store(source_ptr + row, choices // TOPK, mask=own)
        tl.store(row_probs_ptr + row, tl.load(probs_ptr + choices, mask=mask), mask=own)
        if block == 0:
            mine = (numbers >= first) & (numbers < first + EACH)
            tl.store(offsets_ptr + numbers - first, tl.minimum(offsets - skipped, num_rows), mask=mine)
            begin = (numbers % EACH == 0) & (numbers < num_experts)
            tl.store(starts_ptr + numbers // EACH, offsets - totals, mask=begin)
            rows = tl.sum(tl.where(mine, totals, 0), axis=0)
            tl.store(overflow_ptr, tl.maximum(tl.load(overflow_ptr), (rows - num_rows).to(tl.int64)))
    else:
        tl.store(order_ptr + inverse, choices, mask=mask)
        tl.store(source_ptr + inverse, choices // TOPK, mask=mask)
        if block == 0:
            tl.store(offsets_ptr + numbers, offsets, mask=numbers < num_experts)


@triton.jit
def _sort_few_kernel(
    experts_ptr,
    order_ptr,
    inverse_ptr,
    source_ptr,
    offsets_ptr,
    length,
    num_experts,
    TOPK: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
):
    """Sort a block of choices, given all of them. A word holds the counts of four experts, 16 bits each: a single sum
    counts four experts, and a product with ones in all fields sums the fields up to each.
    """
    first = tl.program_id(0) * BLOCK
    everyone = tl.arange(0, ALL)
    # The expert in place of one that does not exist is in no word.
    others = tl.load(experts_ptr + everyone, mask=everyone < length, other=4 * WORDS)
    choices = first + tl.arange(0, BLOCK)
    mask = choices < length
    expert = tl.load(experts_ptr + choices, mask=mask, other=4 * WORDS)
    one_of_others = tl.full([ALL], 1, dtype=tl.int64) << (others % 4 * 16)
    field = expert % 4 * 16
    one = tl.full([BLOCK], 1, dtype=tl.int64) << field
    inverse = tl.zeros([BLOCK], dtype=tl.int64)
    base = tl.full([], 0, dtype=tl.int64)
    for word in tl.static_range(WORDS):
        counted = tl.where(others // 4 == word, one_of_others, 0)
        totals = tl.sum(counted, axis=0)
        before = tl.sum(tl.where(everyone < first, counted, 0), axis=0)
        ends = totals * ONES + base * ONES
        mine = tl.where(expert // 4 == word, one, 0)
        places = ends - totals + before + tl.cumsum(mine, axis=0) - mine
        inverse = tl.where(expert // 4 == word, (places >> field) & 0xFFFF, inverse)
        if tl.program_id(0) == 0:
            fields = tl.arange(0, 4)
            tl.store(
                offsets_ptr + 4 * word + fields, (ends >> (fields * 16)) & 0xFFFF, mask=4 * word + fields < num_experts
            )
        base = (ends >> 48) & 0xFFFF
    tl.store(inverse_ptr + choices, inverse, mask=mask)
    tl.store(order_ptr + inverse, choices, mask=mask)
    tl.store(source_ptr + inverse, choices // TOPK, mask=mask)


def sort_choices(experts: Tensor, num_experts: int, topk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute permute.sort_by_expert. experts are contiguous."""
    length = experts.numel()
    order, inverse, source = torch.empty(3, length, dtype=experts.dtype, device=experts.device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=experts.device)
    if length <= MOST_AT_ONCE and num_experts <= FEW_EXPERTS:
        _sort_few_kernel[(triton.cdiv(length, BLOCK),)](
            experts,
            order,
            inverse,
            source,
            offsets,
            length,
            num_experts,
            TOPK=topk,
            WORDS=triton.cdiv(num_experts, 4),
            BLOCK=BLOCK,
            ALL=triton.next_power_of_2(length),
            num_warps=8,
        )
        return order, inverse, offsets, source
    # Results that ALL_RANKS asks for are not written; any tensor stands in for them.
    results = (inverse, order, source, order, offsets, offsets, offsets)
    sizes, own = (length, length), range(num_experts)
    _run(1, (experts, experts), (experts, experts), results, sizes, own, num_experts, topk, all_ranks=False)
    return order, inverse, offsets, source


def route(
    probs: Tensor,
    experts: Tensor,
    shape: tuple[int, int],
    num_experts: int,
    own: range,
    num_rows: int,
    overflow: Tensor,
) -> Routes:
    """Sort the choices of all processes of an expert group by expert, and return the routes of this process.

    Args:
        probs, experts: int64 [p], addresses of each process's probabilities fp32 and experts int32, both [t, topk].
        shape: (t, topk).
        own: numbers of this process's experts; every process has the same number.
        num_rows: capacity in rows.
        overflow: int64 scalar, raised to the number of rows beyond the capacity if it was smaller.
    """
    size, (tokens, topk), device = probs.numel(), shape, overflow.device
    all_probs = torch.empty(size * tokens, topk, dtype=torch.float32, device=device)
    all_experts, inverse = (torch.empty(size * tokens, topk, dtype=torch.int32, device=device) for _ in range(2))
    row_probs = torch.empty(num_rows, dtype=torch.float32, device=device)
    source, offsets, starts = (
        torch.empty(count, dtype=torch.int32, device=device) for count in (num_rows, len(own), num_experts // len(own))
    )
    # The order of the choices is not written; any tensor stands in for it.
    results = (inverse, inverse, source, row_probs, offsets, starts, overflow)
    read, sizes = (all_probs, all_experts), (tokens * topk, num_rows)
    _run(size, (probs, experts), read, results, sizes, own, num_experts, topk, all_ranks=True)
    return Routes(source, row_probs, offsets, inverse, starts, all_experts)


def _run(
    size: int,
    given: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    results: tuple[Tensor, ...],
    sizes: tuple[int, int],
    own: range,
    num_experts: int,
    topk: int,
    *,
    all_ranks: bool,
) -> None:
    """Launch both kernels.

    given: probs and experts as the first kernel reads them; read: as it leaves them for the second; sizes: choices of a
    process, and rows.
    """
    padded = triton.next_power_of_2(num_experts)
    block = min(BLOCK, max(1, MOST_COUNTED // padded))
    grid = (size, triton.cdiv(sizes[0], block))
    blocks = grid[0] * grid[1]
    counts = torch.empty(blocks, padded, dtype=torch.int32, device=results[0].device)
    kinds = {"ALL_RANKS": all_ranks, "NUM_EXPERTS": padded, "BLOCK": block}
    _count_kernel[grid](*given, *read, counts, sizes[0], **kinds)
    _place_kernel[grid](
        *read,
        counts,
        *results,
        *sizes,
        own.start,
        num_experts,
        EACH=len(own),
        TOPK=topk,
        BLOCKS=min(triton.next_power_of_2(blocks), max(1, MOST_COUNTED // padded)),
        **kinds,
    )

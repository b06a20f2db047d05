"""Triton kernels of attention/cached_attention.py: attention of one new token of each row to cached keys and values.

A program computes one group of heads for one part of the cache, so that a single row occupies the whole GPU; a second
kernel joins the parts. The rotation of the query and of the key, and writing the key and the value into the cache, are
part of the first kernel: only the program whose part of the cache gets the new token reads it, from registers.
Import only on machines with a GPU.

The length of a part is a constant of both kernels, with which their loops are compiled. Caches of up to 4,096 tokens
(2,048 with heads of 256) share one length; each further 4,096 (2,048) have a longer one, for which both kernels are
compiled again. The second kernel is also compiled for each power of 2 of the number of parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 64
MOST_PARTS = 64
SIZES = (16, 32, 64, 128, 256)
"""Head sizes of the kernels."""


@triton.jit
def _rotated(source, cosine, sine, columns, SIZE: tl.constexpr):
    """Return heads of `mixed` at pointers [.., size], rotated and rounded to their dtype, as fp32."""
    values = tl.load(source + columns).to(tl.float32)
    others = tl.load(source + (columns + SIZE // 2) % SIZE).to(tl.float32)
    others = tl.where(columns < SIZE // 2, -others, others)
    return (values * cosine + others * sine).to(source.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=("angle_rows", "max_length"))
def _attend_kernel(
    mixed_ptr,
    cosine_ptr,
    sine_ptr,
    keys_ptr,
    values_ptr,
    place_ptr,
    mask_ptr,
    sums_ptr,
    largest_ptr,
    totals_ptr,
    angle_rows,
    max_length,
    scale,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PART: tl.constexpr,
):
    """Attend to one part of the cache. The factor between powers of e and of 2 is part of `scale`."""
    place = tl.load(place_ptr).to(tl.int32)
    begin = tl.program_id(1) * PART
    if begin <= place:
        own = tl.program_id(0).to(tl.int64)
        row = own // GROUPS
        columns = tl.arange(0, SIZE)
        heads = tl.arange(0, BLOCK_H)
        exists = heads < HEADS
        angle = tl.where(angle_rows > 1, row, 0) * SIZE
        cosine = tl.load(cosine_ptr + angle + columns).to(tl.float32)
        sine = tl.load(sine_ptr + angle + columns).to(tl.float32)
        mixed = mixed_ptr + own * ((HEADS + 2) * SIZE)
        # Heads that do not exist repeat the first one.
        queries = mixed + tl.where(exists, heads, 0)[:, None] * SIZE
        query = _rotated(queries, cosine[None, :], sine[None, :], columns[None, :], SIZE)
        key = _rotated(mixed + HEADS * SIZE, cosine, sine, columns, SIZE)
        value = tl.load(mixed + (HEADS + 1) * SIZE + columns)
        keys = keys_ptr + own * max_length * SIZE
        values = values_ptr + own * max_length * SIZE
        # The part that gets the new token begins with it; the others with nothing.
        has_new = begin + PART > place
        target = place.to(tl.int64) * SIZE + columns
        tl.store(keys + target, key.to(keys_ptr.dtype.element_ty), mask=(columns < SIZE) & has_new)
        tl.store(values + target, value, mask=(columns < SIZE) & has_new)
        largest = tl.where(has_new, tl.sum(query * key[None, :], axis=1) * scale, float("-inf"))
        total = tl.where(has_new, 1.0, 0.0) + tl.zeros([BLOCK_H], dtype=tl.float32)
        sums = tl.where(has_new, value.to(tl.float32), 0.0)[None, :] + tl.zeros([BLOCK_H, SIZE], dtype=tl.float32)
        query = query.to(keys_ptr.dtype.element_ty)
        end = tl.minimum(begin + PART, place)
        for start in range(begin, end, BLOCK_KEYS):
            numbers = start + tl.arange(0, BLOCK_KEYS)
            there = numbers < end
            allowed = tl.load(mask_ptr + row * max_length + numbers, mask=there, other=0) != 0
            cells = numbers[:, None].to(tl.int64) * SIZE + columns[None, :]
            cached = tl.load(keys + cells, mask=there[:, None], other=0.0)
            known = tl.load(values + cells, mask=there[:, None], other=0.0)
            scores = tl.dot(query, tl.trans(cached)) * scale
            scores = tl.where(allowed[None, :], scores, float("-inf"))
            highest = tl.maximum(largest, tl.max(scores, axis=1))
            # If all are masked so far, differences of infinities would be NaN.
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(scores - base[:, None])
            fade = tl.exp2(largest - base)
            total = total * fade + tl.sum(weights, axis=1)
            sums = sums * fade[:, None] + tl.dot(weights.to(values_ptr.dtype.element_ty), known)
            largest = highest
        part = (own * tl.num_programs(1) + tl.program_id(1)) * HEADS + heads
        tl.store(sums_ptr + part[:, None] * SIZE + columns[None, :], sums, mask=exists[:, None])
        tl.store(largest_ptr + part, largest, mask=exists)
        tl.store(totals_ptr + part, total, mask=exists)


@triton.jit(do_not_specialize=("parts",))
def _join_kernel(
    sums_ptr,
    largest_ptr,
    totals_ptr,
    place_ptr,
    output_ptr,
    parts,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCK_PARTS)
    columns = tl.arange(0, SIZE)
    # Parts behind the token were not computed.
    there = numbers <= tl.load(place_ptr).to(tl.int32) // PART
    part = (head // HEADS * parts + numbers) * HEADS + head % HEADS
    largest = tl.load(largest_ptr + part, mask=there, other=float("-inf"))
    total = tl.load(totals_ptr + part, mask=there, other=0.0)
    sums = tl.load(sums_ptr + part[:, None] * SIZE + columns[None, :], mask=there[:, None], other=0.0)
    # The token attends to itself: one of them is finite.
    weights = tl.exp2(largest - tl.max(largest, axis=0))
    result = tl.sum(sums * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    tl.store(output_ptr + head * SIZE + columns, result.to(output_ptr.dtype.element_ty))


def cached_attention(
    mixed: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, place: Tensor, mask: Tensor
) -> Tensor:
    """Compute cached_attention.cached_attention. keys and values are contiguous."""
    _, batch, groups, in_group, size = mixed.shape
    heads, max_length = in_group - 2, keys.shape[2]
    block = BLOCK_KEYS if size <= 128 else BLOCK_KEYS // 2
    part = block * triton.cdiv(triton.cdiv(max_length, block), MOST_PARTS)
    parts = triton.cdiv(max_length, part)
    sums = torch.empty(batch * groups, parts, heads, size, dtype=torch.float32, device=mixed.device)
    largest, totals = torch.empty(2, batch * groups, parts, heads, dtype=torch.float32, device=mixed.device)
    output = torch.empty(1, batch, groups * heads * size, dtype=mixed.dtype, device=mixed.device)
    _attend_kernel[(batch * groups, parts)](
        mixed.contiguous(),
        cosine.contiguous(),
        sine.contiguous(),
        keys,
        values,
        place,
        mask.reshape(batch, max_length).contiguous().view(torch.uint8),
        sums,
        largest,
        totals,
        cosine.shape[0],
        max_length,
        math.log2(math.e) / math.sqrt(size),
        GROUPS=groups,
        HEADS=heads,
        BLOCK_H=max(16, triton.next_power_of_2(heads)),
        SIZE=size,
        BLOCK_KEYS=block,
        PART=part,
        num_warps=4,
        num_stages=2,
    )
    _join_kernel[(batch * groups * heads,)](
        sums,
        largest,
        totals,
        place,
        output,
        parts,
        HEADS=heads,
        SIZE=size,
        PART=part,
        BLOCK_PARTS=triton.next_power_of_2(parts),
        num_warps=4 if parts > 8 else 1,
    )
    return output

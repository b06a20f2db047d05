"""Triton kernels for grouped products with weights in NF4 (nf4.py), expanded inside the product.

A weight is read in 4 bit and never written in 16: for few rows, where products take as long as reading the weights,
that is a quarter of the bytes, and no memory for a copy of them. For many rows each tile of rows expands the weights
again, and expanding them first is faster (quantized_mm.py decides).

Two numbers share a byte, the even one in the low half. The halves are separate operands, so that nothing has to be
interleaved: forward, of the even and odd inputs, which `split_halves` brings apart; in the gradient, of the even and
odd columns, joined before they are stored. The numbers are those of nf4_triton.expand, bit for bit. Tiles are numbered
as in portable_mm_triton.py. Import this module only on machines with a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.quantized.formats import levels_on

ROWS = (16, 32, 64, 128)
"""Rows of a tile; the least that is at least an expert's number of rows on average."""
HALF_BLOCK = 32
"""Bytes that share a scale."""
COLUMN_BYTES = 64
"""Bytes of a row of the weight that a tile of the gradient covers: twice as many columns."""
OUTPUTS = 128
"""Columns of a tile of the forward product."""
DEPTH = 32
"""Step along the sum of the gradient."""
VARYING = ("tokens",)


@triton.jit
def _tile_of(offsets_ptr, tokens, column_tiles, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return this program's expert, first row, end of the expert's rows (0 without a tile), and column tile."""
    numbers = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + numbers, mask=numbers < num_experts, other=0)
    begins = tl.load(offsets_ptr + numbers - 1, mask=(numbers > 0) & (numbers < num_experts), other=0)
    tiles = tl.cdiv(tl.maximum(tl.minimum(ends, tokens) - begins, 0), ROWS) * column_tiles
    cumulated = tl.cumsum(tiles, axis=0)
    number = tl.program_id(0)
    expert = tl.sum((cumulated <= number).to(tl.int32), axis=0)
    mine = numbers == expert
    local = number - tl.sum(tl.where(mine, cumulated - tiles, 0), axis=0)
    row_tiles = tl.maximum(tl.sum(tl.where(mine, tiles, 0), axis=0) // column_tiles, 1)
    end = tl.minimum(tl.sum(tl.where(mine, ends, 0), axis=0), tokens)
    first = tl.sum(tl.where(mine, begins, 0), axis=0) + (local % row_tiles) * ROWS
    return expert, first, end, local // row_tiles


@triton.jit(do_not_specialize=VARYING)
def _forward_4_bits_kernel(
    rows_ptr,
    codes_ptr,
    scales_ptr,
    levels_ptr,
    offsets_ptr,
    output_ptr,
    tokens,
    outputs,
    half_depth,
    num_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    expert, first, end, column = _tile_of(offsets_ptr, tokens, tl.cdiv(outputs, OUTPUTS), num_experts, EXPERTS, ROWS)
    if end == 0:
        return
    rows = first + tl.arange(0, ROWS)
    there = tl.minimum(rows, end - 1)
    at = there.to(tl.int64)
    columns = column * OUTPUTS + tl.arange(0, OUTPUTS)
    weights = expert.to(tl.int64) * outputs + tl.minimum(columns, outputs - 1)
    places = tl.arange(0, HALF_BLOCK)
    left = rows_ptr + at[:, None] * (2 * half_depth) + places[None, :]
    codes = codes_ptr + weights[None, :] * half_depth + places[:, None]
    scales = scales_ptr + weights * (half_depth // HALF_BLOCK)
    result = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for start in range(half_depth // HALF_BLOCK):
        byte = tl.load(codes).to(tl.int32)
        scale = tl.load(scales + start).to(tl.float32)[None, :]
        even = tl.load(left)
        odd = tl.load(left + half_depth)
        low = (tl.load(levels_ptr + (byte & 15)) * scale).to(even.dtype)
        high = (tl.load(levels_ptr + (byte >> 4)) * scale).to(even.dtype)
        result = tl.dot(even, low, result)
        result = tl.dot(odd, high, result)
        left += HALF_BLOCK
        codes += HALF_BLOCK
    target = output_ptr + rows[:, None].to(tl.int64) * outputs + columns[None, :]
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (columns < outputs)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _gradient_4_bits_kernel(
    gradient_ptr,
    codes_ptr,
    scales_ptr,
    levels_ptr,
    offsets_ptr,
    output_ptr,
    tokens,
    outputs,
    half_width,
    num_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    DEPTH: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    expert, first, end, column = _tile_of(offsets_ptr, tokens, tl.cdiv(half_width, BYTES), num_experts, EXPERTS, ROWS)
    if end == 0:
        return
    rows = first + tl.arange(0, ROWS)
    there = tl.minimum(rows, end - 1).to(tl.int64)
    places = column * BYTES + tl.arange(0, BYTES)
    bytes_there = tl.minimum(places, half_width - 1)
    steps = tl.arange(0, DEPTH)
    result = (tl.zeros([ROWS, BYTES], dtype=tl.float32), tl.zeros([ROWS, BYTES], dtype=tl.float32))
    even, odd = result
    for start in range(0, outputs, DEPTH):
        inside = steps < outputs - start
        left = tl.load(
            gradient_ptr + there[:, None] * outputs + start + steps[None, :], mask=inside[None, :], other=0.0
        )
        weights = (expert.to(tl.int64) * outputs + tl.minimum(start + steps, outputs - 1))[:, None]
        byte = tl.load(codes_ptr + weights * half_width + bytes_there[None, :]).to(tl.int32)
        scale = tl.load(scales_ptr + weights * (half_width // HALF_BLOCK) + bytes_there[None, :] // HALF_BLOCK)
        scale = scale.to(tl.float32)
        low = (tl.load(levels_ptr + (byte & 15)) * scale).to(left.dtype)
        high = (tl.load(levels_ptr + (byte >> 4)) * scale).to(left.dtype)
        even = tl.dot(left, low, even)
        odd = tl.dot(left, high, odd)
    kind = output_ptr.dtype.element_ty
    both = tl.reshape(tl.join(even.to(kind), odd.to(kind)), [ROWS, 2 * BYTES])
    columns = 2 * column * BYTES + tl.arange(0, 2 * BYTES)
    target = output_ptr + rows[:, None].to(tl.int64) * (2 * half_width) + columns[None, :]
    tl.store(target, both, mask=(rows < end)[:, None] & (columns < 2 * half_width)[None, :])


def split_halves(rows: Tensor) -> Tensor:
    """Return rows [tokens, k] with the even columns first, then the odd ones."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).reshape(rows.shape)


def fits(codes: Tensor, scales: Tensor) -> bool:
    """Return True if the kernels take these weights: blocks of 64 numbers, and whole tiles of columns."""
    half_width = codes.shape[2]
    return half_width == HALF_BLOCK * scales.shape[2] and half_width % COLUMN_BYTES == 0


def forward_4_bits(rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Return rows [tokens, in] · Wᵀ for W [experts, out, in] in NF4: bf16 [tokens, out]. All inputs are contiguous."""
    experts, outputs, half_depth = codes.shape
    tokens = rows.shape[0]
    output = torch.empty(tokens, outputs, dtype=rows.dtype, device=rows.device)
    tile = rows_of_a_tile(tokens, experts)
    grid = ((triton.cdiv(tokens, tile) + experts - 1) * triton.cdiv(outputs, OUTPUTS),)
    _forward_4_bits_kernel[grid](
        split_halves(rows),
        codes,
        scales,
        levels_on(codes.device),
        offsets,
        output,
        tokens,
        outputs,
        half_depth,
        experts,
        EXPERTS=triton.next_power_of_2(experts),
        ROWS=tile,
        OUTPUTS=OUTPUTS,
        HALF_BLOCK=HALF_BLOCK,
        num_warps=8 if tile > 64 else 4,
        num_stages=3,
    )
    return output


def gradient_4_bits(gradient: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Return gradient [tokens, out] · W for W [experts, out, in] in NF4: bf16 [tokens, in]. All are contiguous."""
    experts, outputs, half_width = codes.shape
    tokens = gradient.shape[0]
    output = torch.empty(tokens, 2 * half_width, dtype=gradient.dtype, device=gradient.device)
    tile = rows_of_a_tile(tokens, experts)
    grid = ((triton.cdiv(tokens, tile) + experts - 1) * triton.cdiv(half_width, COLUMN_BYTES),)
    _gradient_4_bits_kernel[grid](
        gradient,
        codes,
        scales,
        levels_on(codes.device),
        offsets,
        output,
        tokens,
        outputs,
        half_width,
        experts,
        EXPERTS=triton.next_power_of_2(experts),
        ROWS=tile,
        BYTES=COLUMN_BYTES,
        DEPTH=DEPTH,
        HALF_BLOCK=HALF_BLOCK,
        num_warps=8 if tile > 64 else 4,
        num_stages=3,
    )
    return output


def rows_of_a_tile(tokens: int, experts: int) -> int:
    """Return the rows of a tile for so many rows over so many experts."""
    return next((each for each in ROWS if tokens <= each * experts), ROWS[-1])

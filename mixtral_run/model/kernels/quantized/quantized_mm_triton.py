"""Triton kernels of quantized_mm.py. Import only on machines with a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtral_run.model.kernels.quantized.formats import FP8, LARGEST, TINY
from mixtral_run.model.kernels.selected import num_multiprocessors
from mixtral_run.model.kernels.sort_triton import place_tile

TILE = 128
WITH_ROWS, WITH_COLUMNS = 16, 512
"""A program of `quantize_with` quantizes a tile of so many rows and columns."""


@triton.jit
def _quantize_kernel(
    rows_ptr,
    source_ptr,
    columns_ptr,
    offsets_ptr,
    output_ptr,
    scales_ptr,
    width,
    num_experts,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one row a program: all of the row is in registers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row
    if HAS_SOURCE:
        at = tl.load(source_ptr + row)
    value = tl.load(rows_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        if EXPERTS > 1:
            numbers = tl.arange(0, EXPERTS)
            offsets = tl.load(offsets_ptr + numbers, mask=numbers < num_experts, other=2147483647)
            # Rows at or after the last offset belong to no expert: any columns will do.
            expert = tl.minimum(tl.sum((offsets <= row).to(tl.int64), axis=0), num_experts - 1)
            columns_ptr += expert * width
        value = value * tl.load(columns_ptr + columns, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), TINY) / LARGEST
    tl.store(scales_ptr + row, scale)
    value = tl.minimum(tl.maximum(value * (1.0 / scale), -LARGEST), LARGEST)
    tl.store(output_ptr + row * width + columns, value.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expand_8_bits_kernel(values_ptr, scales_ptr, output_ptr, width, BLOCK: tl.constexpr):
    """Expand part of a row. Float8 is no type before compute capability 8.9: exponent and mantissa move to their places
    in float32, whose exponent counts from 120 less.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    byte = tl.load(values_ptr + row * width + columns, mask=inside, other=0).to(tl.int32)
    number = (((byte & 0x80) << 24) | ((byte & 0x7F) << 20)).to(tl.float32, bitcast=True)
    number = number * 1.329227995784916e36 * tl.load(scales_ptr + row)
    tl.store(output_ptr + row * width + columns, number.to(output_ptr.dtype.element_ty), mask=inside)


def expand(values: Tensor, scales: Tensor) -> Tensor:
    """Compute quantized_mm.dequantize in bf16: values float8 e4m3 [.., n], scales fp32 [..]. Both are contiguous."""
    output = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    width = values.shape[-1]
    grid = (values.numel() // width, triton.cdiv(width, 2048))
    _expand_8_bits_kernel[grid](values.view(torch.uint8), scales, output, width, BLOCK=2048)
    return output


@triton.jit
def _transpose_kernel(source_ptr, target_ptr, height, width, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    first = tl.program_id(2).to(tl.int64) * height * width
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    tile = tl.load(source_ptr + first + rows[:, None] * width + columns[None, :], mask=inside, other=0)
    inside = (columns[:, None] < width) & (rows[None, :] < height)
    tl.store(target_ptr + first + columns[:, None] * height + rows[None, :], tl.trans(tile), mask=inside)


def quantize_rows(
    rows: Tensor, columns: Tensor | None, offsets: Tensor | None, source: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize contiguous rows [.., width], times their expert's columns [experts, width] if given, by row.

    offsets: None if there is one expert, or one weight for all rows. source: int64 [tokens], the index in `rows` of
    each token; None if the rows are in order already. Returns values [tokens, width] and scales fp32 [tokens], as
    quantized_mm.quantize does.
    """
    tokens, width = rows.shape if source is None else (source.shape[0], rows.shape[1])
    values = torch.empty(tokens, width, dtype=FP8, device=rows.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(width)
    experts = offsets.shape[0] if offsets is not None else 1
    # Pointers that the kernel does not read are those of the scales.
    _quantize_kernel[(tokens,)](
        rows,
        source if source is not None else scales,
        columns if columns is not None else scales,
        offsets if offsets is not None else scales,
        values,
        scales,
        width,
        experts,
        LARGEST=LARGEST,
        TINY=TINY,
        HAS_SOURCE=source is not None,
        HAS_COLUMNS=columns is not None,
        EXPERTS=triton.next_power_of_2(experts),
        BLOCK=block,
        num_warps=min(max(block // 1024, 4), 32),
    )
    return values, scales


@triton.jit(do_not_specialize=("tokens",))
def _quantize_with_kernel(
    rows_ptr,
    columns_ptr,
    offsets_ptr,
    scales_ptr,
    output_ptr,
    tokens,
    width,
    num_experts,
    LARGEST: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize a tile of one expert's rows: the columns' factors are read once for all of them."""
    expert, first, end = place_tile(offsets_ptr, tokens, tl.program_id(1), num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    local = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = first + local < end
    inside = there[:, None] & (columns < width)[None, :]
    places = first.to(tl.int64) * width + (local[:, None] * width + columns[None, :])
    value = tl.load(rows_ptr + places, mask=inside, other=0.0)
    factors = tl.load(columns_ptr + expert.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
    scales = tl.load(scales_ptr + first + local, mask=there, other=1.0)
    value = value.to(tl.float32) * factors[None, :] * (1.0 / scales)[:, None]
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    tl.store(output_ptr + places, value.to(output_ptr.dtype.element_ty), mask=inside)


def quantize_with(rows: Tensor, columns: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Return the values of `quantize_rows`, given its scales. Rows of no expert are not written."""
    tokens, width = rows.shape
    experts = offsets.shape[0]
    values = torch.empty(tokens, width, dtype=FP8, device=rows.device)
    grid = (triton.cdiv(width, WITH_COLUMNS), triton.cdiv(tokens, WITH_ROWS) + experts - 1)
    _quantize_with_kernel[grid](
        rows,
        columns,
        offsets,
        scales,
        values,
        tokens,
        width,
        experts,
        LARGEST=LARGEST,
        EXPERTS=triton.next_power_of_2(experts),
        ROWS=WITH_ROWS,
        COLUMNS=WITH_COLUMNS,
        num_warps=4,
    )
    return values


def transposed(values: Tensor) -> Tensor:
    """Return one-byte values [experts, out, in] as [experts, in, out], contiguous."""
    experts, height, width = values.shape
    target = torch.empty(experts, width, height, dtype=values.dtype, device=values.device)
    grid = (triton.cdiv(height, TILE), triton.cdiv(width, TILE), experts)
    _transpose_kernel[grid](values.view(torch.uint8), target.view(torch.uint8), height, width, TILE=TILE, num_warps=8)
    return target


# On an H200 with uneven rows these reach 1,130 TFLOP/s; torch's product reaches 800 to 980.
ROWS, COLUMNS, DEPTH, STAGES, WARPS = 128, 256, 128, 3, 8


@triton.jit
def _tiled_product_kernel(
    rows_desc,
    matrices_desc,
    row_scales_ptr,
    scales_ptr,
    offsets_ptr,
    output_ptr,
    width,
    depth,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Compute tiles of the product by persistent programs; the tiles of an expert's columns follow each other."""
    numbers = tl.arange(0, EXPERTS)
    offsets = tl.load(offsets_ptr + numbers)
    begins = tl.load(offsets_ptr + numbers - 1, mask=numbers > 0, other=0)
    high = (offsets - begins + ROWS - 1) // ROWS
    wide = width // COLUMNS
    tiles_to = tl.cumsum(high, axis=0) * wide
    total = tl.sum(high, axis=0) * wide
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=True):
        expert = tl.sum((tiles_to <= tile).to(tl.int32), axis=0)
        mine = numbers == expert
        begin = tl.sum(tl.where(mine, begins, 0), axis=0)
        end = tl.sum(tl.where(mine, offsets, 0), axis=0)
        count = tl.sum(tl.where(mine, high, 0), axis=0)
        local = tile - tl.sum(tl.where(mine, tiles_to - high * wide, 0), axis=0)
        first_row = begin + (local % count) * ROWS
        first_column = (local // count) * COLUMNS
        result = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            # The tile may contain rows of the next expert; they are not stored.
            left = rows_desc.load([first_row, start])
            right = matrices_desc.load([expert * width + first_column, start])
            result = tl.dot(left, right.T, result)
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        inside = rows < end
        result *= tl.load(row_scales_ptr + rows, mask=inside, other=0.0)[:, None]
        if HAS_SCALES:
            result *= tl.load(scales_ptr + expert * width + columns)[None, :]
        places = output_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(places, result.to(output_ptr.dtype.element_ty), mask=inside[:, None])


def fits_tiles(matrices: Tensor) -> bool:
    """Return True if `tiled_product` takes matrices [experts, n, k] of this shape."""
    experts, width, depth = matrices.shape
    return experts & (experts - 1) == 0 and width % COLUMNS == 0 and depth % DEPTH == 0


def tiled_product(
    small: Tensor, matrices: Tensor, row_scales: Tensor, scales: Tensor | None, offsets: Tensor
) -> Tensor:
    """Compute quantized_mm.scaled_product for matrices of shapes that `fits_tiles` accepts; all inputs are
    contiguous.
    """
    experts, width, depth = matrices.shape
    tokens = small.shape[0]
    output = torch.empty(tokens, width, dtype=torch.bfloat16, device=small.device)
    if tokens == 0:
        return output
    most = (triton.cdiv(tokens, ROWS) + experts - 1) * (width // COLUMNS)
    programs = min(num_multiprocessors(small.device), most)
    _tiled_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(small, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(matrices.view(experts * width, depth), [COLUMNS, DEPTH]),
        row_scales,
        scales if scales is not None else row_scales,
        offsets,
        output,
        width,
        depth,
        EXPERTS=experts,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        HAS_SCALES=scales is not None,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return output

"""Triton kernels of quantised.py. Imported only where a GPU is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.quantised import FP8, LARGEST, TINY

BLOCK = 2048
TILE = 128


@triton.jit
def _quantise_kernel(
    rows_ptr,
    columns_ptr,
    ends_ptr,
    output_ptr,
    scales_ptr,
    width,
    num_experts,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a row twice: for its largest number, then to write it."""
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + numbers, mask=numbers < num_experts, other=2147483647)
    expert = tl.sum((ends <= row).to(tl.int64), axis=0)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_COLUMNS:
            value = value * tl.load(columns_ptr + expert * width + columns, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(value))
    scale = tl.maximum(tl.max(largest, axis=0), TINY) / LARGEST
    tl.store(scales_ptr + row, scale)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_COLUMNS:
            value = value * tl.load(columns_ptr + expert * width + columns, mask=inside, other=0.0)
        value = tl.minimum(tl.maximum(value / scale, -LARGEST), LARGEST)
        tl.store(output_ptr + row * width + columns, value.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(source_ptr, target_ptr, height, width, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    first = tl.program_id(2).to(tl.int64) * height * width
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    tile = tl.load(source_ptr + first + rows[:, None] * width + columns[None, :], mask=inside, other=0)
    inside = (columns[:, None] < width) & (rows[None, :] < height)
    tl.store(target_ptr + first + columns[:, None] * height + rows[None, :], tl.trans(tile), mask=inside)


def quantise_rows(rows: Tensor, columns: Tensor | None, ends: Tensor) -> tuple[Tensor, Tensor]:
    """rows [tokens, width], contiguous, times their expert's columns [experts, width] where given, in 8 bit by row.

    Returns values [tokens, width] and scales fp32 [tokens], as quantised.quantise.
    """
    tokens, width = rows.shape
    values = torch.empty(tokens, width, dtype=FP8, device=rows.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    _quantise_kernel[(tokens,)](
        rows,
        columns if columns is not None else scales,
        ends,
        values,
        scales,
        width,
        ends.shape[0],
        LARGEST=LARGEST,
        TINY=TINY,
        HAS_COLUMNS=columns is not None,
        EXPERTS=triton.next_power_of_2(ends.shape[0]),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return values, scales


def turned(values: Tensor) -> Tensor:
    """[experts, out, in] → [experts, in, out], contiguous, of one-byte numbers."""
    experts, height, width = values.shape
    target = torch.empty(experts, width, height, dtype=values.dtype, device=values.device)
    grid = (triton.cdiv(height, TILE), triton.cdiv(width, TILE), experts)
    _turn_kernel[grid](values.view(torch.uint8), target.view(torch.uint8), height, width, TILE=TILE, num_warps=8)
    return target

"""Triton kernels of the quantized experts of a single token: few_tokens.quantized_outputs_of_one.

As in few_tokens_triton.py, a program multiplies few rows of a matrix and reads each once. The weights are expanded in
registers; the token is not quantized. Sums are fp32. Import only on machines with a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.decoding.few_tokens_triton import Tile, depth_of
from mixtral_run.model.kernels.decoding.halves import Halves
from mixtral_run.model.kernels.decoding.one_adapter_triton import from_adapter, inner_of_one
from mixtral_run.model.kernels.quantized.formats import FP8, levels_on
from mixtral_run.model.kernels.requirements import NATIVE_FLOAT8
from mixtral_run.model.kernels.selected import capability_of

EIGHT_BITS = Tile(2, 4096, 4), Tile(1, 256, 1)
FOUR_BITS = Tile(8, 128, 1), Tile(4, 512, 2)
"""Tiles of the first product and of the second; depth is in numbers of the weight, two of which share a byte of nf4."""


@triton.jit
def _from_8_bits(value):
    """Return e4m3 as fp32, from float8 or, where the GPU has no such type, from bytes: exponent and mantissa move to
    their places in fp32, whose exponent counts from 120 less.
    """
    if value.dtype == tl.uint8:
        byte = value.to(tl.int32)
        number = (((byte & 0x80) << 24) | ((byte & 0x7F) << 20)).to(tl.float32, bitcast=True)
        return number * 1.329227995784916e36
    return value.to(tl.float32)


@triton.jit
def _gated_8_bits_kernel(
    token_ptr,
    values_ptr,
    scales_ptr,
    experts_ptr,
    active_ptr,
    inner_ptr,
    half_ptr,
    half_stride,
    ffn,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    choice = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DEPTH)
    expert = tl.load(experts_ptr + choice)
    first = values_ptr + expert * (2 * ffn * HIDDEN) + (rows[:, None].to(tl.int64) * HIDDEN + columns[None, :])
    second = first + ffn.to(tl.int64) * HIDDEN
    gates = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    ups = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        gate = tl.load(first + start, eviction_policy="evict_first")
        up = tl.load(second + start, eviction_policy="evict_first")
        numbers = tl.load(token_ptr + start + columns).to(tl.float32)[None, :]
        gates += _from_8_bits(gate) * numbers
        ups += _from_8_bits(up) * numbers
    scales = scales_ptr + expert * (2 * ffn) + rows
    gate = tl.sum(gates, axis=1) * tl.load(scales)
    up = tl.sum(ups, axis=1) * tl.load(scales + ffn)
    if RANK > 0:
        half = half_ptr + expert * half_stride
        gate += from_adapter(inner_ptr + choice * RANK, half, rows, RANK, PADDED)
        up += from_adapter(inner_ptr + choice * RANK, half, rows + ffn, RANK, PADDED)
    active = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(active_ptr + choice * ffn + rows, active.to(active_ptr.dtype.element_ty))


@triton.jit
def _summed_8_bits_kernel(
    active_ptr,
    values_ptr,
    scales_ptr,
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
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, DEPTH)
    places = rows[:, None].to(tl.int64) * FFN + columns[None, :]
    total = tl.zeros([ROWS], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        expert = tl.load(experts_ptr + choice)
        sums = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
        for start in range(0, FFN, DEPTH):
            values = tl.load(values_ptr + expert * (hidden * FFN) + places + start, eviction_policy="evict_first")
            sums += _from_8_bits(values) * tl.load(active_ptr + choice * FFN + start + columns).to(tl.float32)[None, :]
        part = tl.sum(sums, axis=1) * tl.load(scales_ptr + expert * hidden + rows)
        if RANK > 0:
            half = half_ptr + expert * half_stride
            part += from_adapter(inner_ptr + choice * RANK, half, rows, RANK, PADDED)
        total += part * tl.load(probs_ptr + choice)
    tl.store(output_ptr + rows, total.to(output_ptr.dtype.element_ty))


@triton.jit
def _times_4_bits(codes_ptr, scales_ptr, levels_ptr, row_ptr, start, pairs, BLOCK: tl.constexpr):
    """Return the products of a slice of a row with numbers of a weight, added in pairs: fp32 [rows, slice / 2].

    codes_ptr, scales_ptr: places [rows, 1] of the weight's rows. pairs: numbers of the slice's bytes. BLOCK: numbers
    that share a scale.
    """
    places = start + pairs
    byte = tl.load(codes_ptr + places[None, :], eviction_policy="evict_first").to(tl.int32)
    scale = tl.load(scales_ptr + (2 * places // BLOCK)[None, :]).to(tl.float32)
    even = tl.load(row_ptr + 2 * places).to(tl.float32)[None, :]
    odd = tl.load(row_ptr + 2 * places + 1).to(tl.float32)[None, :]
    low, high = tl.load(levels_ptr + (byte & 15)), tl.load(levels_ptr + ((byte >> 4) & 15))
    return (low * even + high * odd) * scale


@triton.jit
def _gated_4_bits_kernel(
    token_ptr,
    codes_ptr,
    scales_ptr,
    levels_ptr,
    experts_ptr,
    active_ptr,
    inner_ptr,
    half_ptr,
    half_stride,
    ffn,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    choice = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, DEPTH // 2)
    expert = tl.load(experts_ptr + choice)
    row = (expert * (2 * ffn) + rows)[:, None].to(tl.int64)
    codes, scales = codes_ptr + row * (HIDDEN // 2), scales_ptr + row * (HIDDEN // BLOCK)
    skipped = ffn.to(tl.int64)
    gates = tl.zeros([ROWS, DEPTH // 2], dtype=tl.float32)
    ups = tl.zeros([ROWS, DEPTH // 2], dtype=tl.float32)
    for start in range(0, HIDDEN // 2, DEPTH // 2):
        gates += _times_4_bits(codes, scales, levels_ptr, token_ptr, start, pairs, BLOCK)
        ups += _times_4_bits(
            codes + skipped * (HIDDEN // 2),
            scales + skipped * (HIDDEN // BLOCK),
            levels_ptr,
            token_ptr,
            start,
            pairs,
            BLOCK,
        )
    gate, up = tl.sum(gates, axis=1), tl.sum(ups, axis=1)
    if RANK > 0:
        half = half_ptr + expert * half_stride
        gate += from_adapter(inner_ptr + choice * RANK, half, rows, RANK, PADDED)
        up += from_adapter(inner_ptr + choice * RANK, half, rows + ffn, RANK, PADDED)
    active = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(active_ptr + choice * ffn + rows, active.to(active_ptr.dtype.element_ty))


@triton.jit
def _summed_4_bits_kernel(
    active_ptr,
    codes_ptr,
    scales_ptr,
    levels_ptr,
    experts_ptr,
    probs_ptr,
    output_ptr,
    inner_ptr,
    half_ptr,
    half_stride,
    hidden,
    FFN: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, DEPTH // 2)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        expert = tl.load(experts_ptr + choice)
        row = (expert * hidden + rows)[:, None].to(tl.int64)
        codes, scales = codes_ptr + row * (FFN // 2), scales_ptr + row * (FFN // BLOCK)
        sums = tl.zeros([ROWS, DEPTH // 2], dtype=tl.float32)
        for start in range(0, FFN // 2, DEPTH // 2):
            sums += _times_4_bits(codes, scales, levels_ptr, active_ptr + choice * FFN, start, pairs, BLOCK)
        part = tl.sum(sums, axis=1)
        if RANK > 0:
            half = half_ptr + expert * half_stride
            part += from_adapter(inner_ptr + choice * RANK, half, rows, RANK, PADDED)
        total += part * tl.load(probs_ptr + choice)
    tl.store(output_ptr + rows, total.to(output_ptr.dtype.element_ty))


def outputs_of_one(
    token: Tensor,
    experts: Tensor,
    probs: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    adapters: tuple[Halves | None, Halves | None] = (None, None),
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """Compute few_tokens.quantized_outputs_of_one. All are contiguous."""
    topk, ffn, hidden = experts.shape[1], first[0].shape[1] // 2, second[0].shape[1]
    active = torch.empty(topk, ffn, dtype=token.dtype, device=token.device)
    output = torch.empty(1, hidden, dtype=token.dtype, device=token.device)
    in_4_bits = first[0].dtype is not FP8
    gated, summed = tiles or (FOUR_BITS if in_4_bits else EIGHT_BITS)
    gate = {"HIDDEN": hidden, "ROWS": gated.rows, "DEPTH": depth_of(gated, hidden), "num_warps": gated.warps}
    total = {"FFN": ffn, "TOPK": topk, "ROWS": summed.rows, "DEPTH": depth_of(summed, ffn), "num_warps": summed.warps}
    grids = (ffn // gated.rows, topk), (hidden // summed.rows,)
    inner = inner_of_one(token, experts, adapters[0])
    if in_4_bits:
        levels = levels_on(token.device)
        gate["BLOCK"], total["BLOCK"] = (2 * codes.shape[-1] // scales.shape[-1] for codes, scales in (first, second))
        _gated_4_bits_kernel[grids[0]](
            token, *first, levels, experts, active, *inner.pointers, ffn, **gate, **inner.sizes
        )
        inner = inner_of_one(active, experts, adapters[1])
        _summed_4_bits_kernel[grids[1]](
            active, *second, levels, experts, probs, output, *inner.pointers, hidden, **total, **inner.sizes
        )
        return output
    first, second = _as_readable(*first), _as_readable(*second)
    _gated_8_bits_kernel[grids[0]](token, *first, experts, active, *inner.pointers, ffn, **gate, **inner.sizes)
    inner = inner_of_one(active, experts, adapters[1])
    _summed_8_bits_kernel[grids[1]](
        active, *second, experts, probs, output, *inner.pointers, hidden, **total, **inner.sizes
    )
    return output


def _as_readable(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values as bytes on a GPU that has no float8, and both as they are on others."""
    capability = capability_of(values.device)
    has_float8 = capability is not None and capability >= NATIVE_FLOAT8
    return (values if has_float8 else values.view(torch.uint8)), scales

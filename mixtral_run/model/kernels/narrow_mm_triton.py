"""Triton kernels for grouped products with an adapter's matrices (grouped_mm.py): one side is as narrow as the rank.

Their cost is one read of the wide operand; torch's grouped product, made for square tiles, takes up to twice the time.
Sums are taken in a fixed order. Rows at or after the last offset belong to no expert and are not read. Import this
module only on machines with a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.requirements import KernelSet
from mixtral_run.model.kernels.selected import kernels_of

WIDTHS = (16, 32, 64)
"""Supported sizes of the narrow side."""
ROWS, DEPTH = 32, 256
"""A program of `narrow_product` computes ROWS rows, in steps of DEPTH along the sum."""
PROGRAMS, MAX_SPLITS = 1056, 16
"""`narrow_product` splits the sum of few rows, into at most MAX_SPLITS, until there are about PROGRAMS programs."""
COLUMNS, TOKENS = 128, 64
"""A program of `narrow_outer_product` computes COLUMNS columns, in steps of TOKENS along the sum."""
BOTH_COLUMNS, BOTH_TOKENS = 512, 64
"""The same for `both_narrow_products`; half as many columns at rank 64."""
SUMMED, AT_ONCE = 256, 16
"""A program of `_sum` adds the parts of SUMMED numbers, and waits for AT_ONCE parts at a time."""
VARYING = ("tokens", "splits")
"""Arguments that change with every step under EP: specialized on their values, or on multiples of 16, the kernels would
be compiled again and again."""


@triton.jit(do_not_specialize=VARYING)
def _narrow_product_kernel(
    rows_ptr,
    source_ptr,
    matrices_ptr,
    offsets_ptr,
    output_ptr,
    tokens,
    depth,
    matrix_stride,
    depth_stride,
    column_stride,
    num_experts,
    split_depth,
    scale,
    EXPERTS: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
):
    """Compute a block of rows over one split of the sum; the second index of the grid is the split.

    Rows are sorted by expert, and an expert may end within a block: a program visits all experts of its rows.
    """
    first = tl.program_id(0) * ROWS
    limit = tl.minimum(tl.load(offsets_ptr + num_experts - 1), tokens)
    last = tl.minimum(first + ROWS, limit)
    rows = first + tl.arange(0, ROWS)
    narrow = tl.arange(0, NARROW)
    places = tl.arange(0, DEPTH)
    numbers = tl.arange(0, EXPERTS)
    offsets = tl.load(offsets_ptr + numbers, mask=numbers < num_experts, other=2147483647)
    first_expert = tl.sum((offsets <= first).to(tl.int32), axis=0)
    last_expert = tl.sum((offsets <= last - 1).to(tl.int32), axis=0)
    result = tl.zeros([ROWS, NARROW], dtype=tl.float32)
    at = rows.to(tl.int64)
    if HAS_SOURCE:
        at = tl.load(source_ptr + rows, mask=rows < limit, other=0)
    for expert in range(first_expert, last_expert + 1):
        end = tl.load(offsets_ptr + expert)
        begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
        mine = (rows >= begin) & (rows < end)
        left = rows_ptr + at[:, None] * depth + places[None, :]
        right = matrices_ptr + expert.to(tl.int64) * matrix_stride
        right += places[:, None] * depth_stride + narrow[None, :] * column_stride
        lowest = tl.program_id(1) * split_depth
        for start in range(lowest, tl.minimum(lowest + split_depth, depth), DEPTH):
            inside = places < depth - start
            row = tl.load(left + start, mask=mine[:, None] & inside[None, :], other=0.0)
            matrix = tl.load(right + start * depth_stride, mask=inside[:, None], other=0.0)
            result = tl.dot(row, matrix, result)
    target = output_ptr + (tl.program_id(1) * tokens + rows[:, None]).to(tl.int64) * NARROW + narrow[None, :]
    tl.store(target, (result * scale).to(output_ptr.dtype.element_ty), mask=(rows < tokens)[:, None])


@triton.jit(do_not_specialize=VARYING)
def _narrow_sum_kernel(
    parts_ptr,
    offsets_ptr,
    output_ptr,
    size,
    splits,
    num_experts,
    scale,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros([BLOCK], dtype=tl.float32)
    there = tl.load(offsets_ptr + num_experts - 1) * NARROW
    for first in range(0, splits, AT_ONCE):
        for each in tl.static_range(AT_ONCE):
            mask = (places < there) & (first + each < splits)
            result += tl.load(parts_ptr + (first + each) * size + places, mask=mask, other=0.0)
    tl.store(output_ptr + places, (result * scale).to(output_ptr.dtype.element_ty), mask=places < size)


@triton.jit
def _narrow_outer_kernel(
    wide_ptr,
    source_ptr,
    narrow_ptr,
    offsets_ptr,
    output_ptr,
    width,
    column_stride,
    narrow_stride,
    scale,
    NARROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
):
    expert = tl.program_id(1)
    end = tl.load(offsets_ptr + expert)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    narrow = tl.arange(0, NARROW)
    inside = columns < width
    result = tl.zeros([NARROW, COLUMNS], dtype=tl.float32)
    for start in range(begin, end, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        mine = tokens < end
        left = tl.load(narrow_ptr + tokens[None, :] * NARROW + narrow[:, None], mask=mine[None, :], other=0.0)
        at = tokens.to(tl.int64)
        if HAS_SOURCE:
            at = tl.load(source_ptr + tokens, mask=mine, other=0)
        places = wide_ptr + at[:, None] * width + columns[None, :]
        right = tl.load(places, mask=mine[:, None] & inside[None, :], other=0.0)
        result = tl.dot(left, right, result)
    target = output_ptr + expert.to(tl.int64) * width * NARROW
    target += columns[None, :] * column_stride + narrow[:, None] * narrow_stride
    tl.store(target, (result * scale).to(output_ptr.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=VARYING)
def _both_narrow_kernel(
    wide_ptr,
    narrow_ptr,
    matrices_ptr,
    offsets_ptr,
    parts_ptr,
    output_ptr,
    tokens,
    width,
    scale,
    NARROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    expert = tl.program_id(1)
    end = tl.load(offsets_ptr + expert)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    narrow = tl.arange(0, NARROW)
    inside = columns < width
    matrices = (expert.to(tl.int64) * width + columns[:, None]) * NARROW + narrow[None, :]
    matrix = tl.load(matrices_ptr + matrices, mask=inside[:, None], other=0.0)
    result = tl.zeros([NARROW, COLUMNS], dtype=tl.float32)
    for start in range(begin, end, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        mine = rows < end
        left = tl.load(narrow_ptr + rows[None, :] * NARROW + narrow[:, None], mask=mine[None, :], other=0.0)
        places = wide_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
        right = tl.load(places, mask=mine[:, None] & inside[None, :], other=0.0)
        result = tl.dot(left, right, result)
        part = parts_ptr + (tl.program_id(0).to(tl.int64) * tokens + rows[:, None]) * NARROW + narrow[None, :]
        tl.store(part, tl.dot(right, matrix), mask=mine[:, None])
    target = output_ptr + (expert.to(tl.int64) * width + columns[None, :]) * NARROW + narrow[:, None]
    tl.store(target, (result * scale).to(output_ptr.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=VARYING)
def _narrow_added_kernel(
    base_ptr,
    inner_ptr,
    outer_ptr,
    offsets_ptr,
    output_ptr,
    tokens,
    width,
    scale,
    column_stride,
    narrow_stride,
    num_experts,
    EXPERTS: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    limit = tl.minimum(tl.load(offsets_ptr + num_experts - 1), tokens)
    last = tl.minimum(first + ROWS, limit)
    rows = first + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    narrow = tl.arange(0, NARROW)
    numbers = tl.arange(0, EXPERTS)
    offsets = tl.load(offsets_ptr + numbers, mask=numbers < num_experts, other=2147483647)
    first_expert = tl.sum((offsets <= first).to(tl.int32), axis=0)
    last_expert = tl.sum((offsets <= last - 1).to(tl.int32), axis=0)
    inside = (rows < limit)[:, None] & (columns < width)[None, :]
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    base = tl.load(base_ptr + places, mask=inside, other=0.0)
    result = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for expert in range(first_expert, last_expert + 1):
        end = tl.load(offsets_ptr + expert)
        begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
        mine = (rows >= begin) & (rows < end)
        inner = tl.load(inner_ptr + rows[:, None] * NARROW + narrow[None, :], mask=mine[:, None], other=0.0)
        outer = outer_ptr + expert.to(tl.int64) * width * NARROW
        outer += columns[None, :] * column_stride + narrow[:, None] * narrow_stride
        result = tl.dot(inner, tl.load(outer, mask=(columns < width)[None, :], other=0.0), result)
    result = base.to(tl.float32) + result * scale
    tl.store(output_ptr + places, result.to(output_ptr.dtype.element_ty), mask=inside)


def narrow_added(
    base: Tensor, inner: Tensor, outer: Tensor, scale: float, offsets: Tensor, *, in_place: bool = False
) -> Tensor:
    """Return base [tokens, m] + scale · inner [tokens, n] · outerᵀ, outer [experts, m, n]; n is one of WIDTHS.

    base and inner are contiguous; so is each matrix of outer, or its transpose. in_place: overwrite base.
    """
    tokens, width = base.shape
    output = base if in_place else torch.empty_like(base)
    _narrow_added_kernel[(triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS))](
        base,
        inner,
        outer,
        offsets,
        output,
        tokens,
        width,
        scale,
        *outer.stride()[1:],
        offsets.shape[0],
        EXPERTS=triton.next_power_of_2(offsets.shape[0]),
        NARROW=inner.shape[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return output


def narrow_product(
    rows: Tensor, matrices: Tensor, offsets: Tensor, source: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Return scale · rows [tokens, k] · matrices [experts, k, n]: [tokens, n]; n is one of WIDTHS.

    rows are contiguous, matrices have any strides. source: int64 [tokens], the index in `rows` of each token.
    """
    tokens, depth = rows.shape if source is None else (source.shape[0], rows.shape[1])
    experts, _, narrow = matrices.shape
    output = torch.empty(tokens, narrow, dtype=rows.dtype, device=rows.device)
    blocks = triton.cdiv(tokens, ROWS)
    at_once = DEPTH if narrow < 64 else DEPTH // 2
    # Few rows make few programs, which cannot saturate the memory: then the sum is split over several programs.
    splits = max(min(triton.cdiv(PROGRAMS, blocks), depth // (4 * at_once), MAX_SPLITS), 1)
    parts = torch.empty(splits, tokens, narrow, dtype=torch.float32, device=rows.device) if splits > 1 else output
    _narrow_product_kernel[(blocks, splits)](
        rows,
        source if source is not None else offsets,
        matrices,
        offsets,
        parts,
        tokens,
        depth,
        *matrices.stride(),
        experts,
        triton.cdiv(triton.cdiv(depth, splits), at_once) * at_once,
        scale if splits == 1 else 1.0,
        EXPERTS=triton.next_power_of_2(experts),
        NARROW=narrow,
        ROWS=ROWS,
        DEPTH=at_once,
        HAS_SOURCE=source is not None,
        num_warps=4,
        num_stages=4,
    )
    if splits > 1:
        _sum(parts, scale, offsets, output)
    return output


def _sum(parts: Tensor, scale: float, offsets: Tensor, output: Tensor) -> None:
    """Sum parts, times scale, of fp32 [splits, tokens, n] into output [tokens, n]; rows of no expert become zeros."""
    size = output.numel()
    _narrow_sum_kernel[(triton.cdiv(size, SUMMED),)](
        parts,
        offsets,
        output,
        size,
        parts.shape[0],
        offsets.shape[0],
        scale,
        NARROW=output.shape[1],
        BLOCK=SUMMED,
        AT_ONCE=AT_ONCE,
    )


def narrow_outer_product(
    wide: Tensor,
    narrow: Tensor,
    offsets: Tensor,
    *,
    narrow_first: bool,
    source: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return scale · narrowᵀ · wide summed over each expert's rows, [experts, n, m], or its transpose, [experts, m, n].

    Args:
        wide, narrow: [tokens, m] and [tokens, n], both contiguous; n is one of WIDTHS.
        narrow_first: True for [experts, n, m].
        source: index into `wide`, see `narrow_product`.
        dtype: of the result; default wide's. Sums are fp32.
    """
    width, rank, experts = wide.shape[1], narrow.shape[1], offsets.shape[0]
    shape = (experts, rank, width) if narrow_first else (experts, width, rank)
    output = torch.empty(shape, dtype=dtype or wide.dtype, device=wide.device)
    _narrow_outer_kernel[(triton.cdiv(width, COLUMNS), experts)](
        wide,
        source if source is not None else offsets,
        narrow,
        offsets,
        output,
        width,
        *((1, width) if narrow_first else (rank, 1)),
        scale,
        NARROW=rank,
        COLUMNS=COLUMNS,
        TOKENS=TOKENS,
        HAS_SOURCE=source is not None,
        num_warps=4,
        num_stages=4,
    )
    return output


def both_pay(wide: Tensor) -> bool:
    """Return True if `both_narrow_products` of wide [tokens, m] runs, and is faster than two kernels: it saves one read
    of much memory, and there are enough columns for many programs. It needs Hopper's shared memory.
    """
    return kernels_of(wide.device) is KernelSet.HOPPER and wide.shape[0] >= 2048 and wide.shape[1] >= 8192


def both_narrow_products(
    wide: Tensor, matrices: Tensor, narrow: Tensor, scale: float, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute `narrow_product` and `narrow_outer_product`, both times scale, with one read of `wide`.

    Returns wide [tokens, m] · matrices [experts, m, n], [tokens, n], and wideᵀ · narrow [tokens, n] summed over each
    expert's rows, [experts, m, n] in dtype. All inputs are contiguous; n is one of WIDTHS; sums are fp32.
    """
    tokens, width = wide.shape
    experts, _, rank = matrices.shape
    columns = BOTH_COLUMNS if rank < 64 else BOTH_COLUMNS // 2
    blocks = triton.cdiv(width, columns)
    product = torch.empty(tokens, rank, dtype=wide.dtype, device=wide.device)
    outer = torch.empty(experts, width, rank, dtype=dtype, device=wide.device)
    parts = torch.empty(blocks, tokens, rank, dtype=torch.float32, device=wide.device)
    _both_narrow_kernel[(blocks, experts)](
        wide,
        narrow,
        matrices,
        offsets,
        parts,
        outer,
        tokens,
        width,
        scale,
        NARROW=rank,
        COLUMNS=columns,
        TOKENS=BOTH_TOKENS,
        num_warps=8,
        num_stages=3,
    )
    _sum(parts, scale, offsets, product)
    return product, outer

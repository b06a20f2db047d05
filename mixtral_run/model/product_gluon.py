"""Grouped products in bf16 for Hopper, with an adapter's part in the same sum. Imported only where a GPU is.

    output [tokens, n] = rows [tokens, k] · Wᵀ, W [experts, n, k]       forward
    output [tokens, n] = rows [tokens, k] · W,  W [experts, k, n]       gradient of the rows
    … + inner [tokens, r] · the adapter's other half of each expert

Rows are ragged: an expert's last tile is rarely full. Here a tile is 192 × 256 in three groups of four warps, 64 rows
each: few tiles read a weight, and a group without rows of its own does nothing. One warp brings slices of both operands
to shared memory; the groups multiply them, each in two halves of 128 columns, since an instruction of 256 wants more
registers than a program of three groups starts with.

The adapter's part is one more slice: what TMA reads beyond `inner`'s r columns is zero, and so adds nothing whatever
stands in the other operand there.

Written in Gluon, Triton's language of layouts (triton/experimental/gluon; see gradient_gluon.py for the versions).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mixtral_run.model.tiles_gluon import place

GROUPS = gl.constexpr(3)
ROWS = gl.constexpr(64)
"""Of one group."""
COLUMNS = gl.constexpr(256)
HALF = gl.constexpr(128)
DEPTH = gl.constexpr(64)
"""Of the sum at a time, a slice: 128 bytes of a row, which is what TMA swizzles."""
STAGES = gl.constexpr(3)
RESULT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def _bring_slice(left_desc, right_desc, left_smem, right_smem, ready, slot, row, last, start, right_row, right_column):
    """One slice of both operands. Rows of the next expert may come along: what they give is not stored."""
    bar = ready.index(slot)
    groups = gl.minimum((last - row + ROWS - 1) // ROWS, GROUPS)
    for number in gl.static_range(GROUPS):
        mbarrier.expect(bar, ((number + 1) * ROWS + COLUMNS) * DEPTH * 2, pred=groups == number + 1)
    for group in gl.static_range(GROUPS):
        left = left_smem.index(slot * GROUPS + group)
        tma.async_copy_global_to_shared(left_desc, [row + group * ROWS, start], bar, left, pred=group < groups)
    tma.async_copy_global_to_shared(right_desc, [right_row, right_column], bar, right_smem.index(slot))


@gluon.jit
def _bring(
    rows_desc,
    matrices_desc,
    inner_desc,
    adapter_desc,
    rows_smem,
    matrices_smem,
    ready,
    free,
    ends_ptr,
    wide,
    steps,
    rank,
    EXPERTS: gl.constexpr,
    TURNED: gl.constexpr,
    ADAPTER: gl.constexpr,
):
    tile = gl.program_id(0)
    expert, row, column, last, total = place(tile, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
    count = 0
    while tile < total:
        right_row = expert * wide * COLUMNS + column
        right_column = column
        for step in range(steps):
            slot = count % STAGES
            mbarrier.wait(free.index(slot), ((count // STAGES) & 1) ^ 1)
            if TURNED:
                right_column = step * DEPTH
            else:
                right_row = (expert * steps + step) * DEPTH
            _bring_slice(
                rows_desc,
                matrices_desc,
                rows_smem,
                matrices_smem,
                ready,
                slot,
                row,
                last,
                step * DEPTH,
                right_row,
                right_column,
            )
            count += 1
        if ADAPTER:
            slot = count % STAGES
            mbarrier.wait(free.index(slot), ((count // STAGES) & 1) ^ 1)
            if TURNED:
                right_column = 0
            else:
                right_row = expert * rank
            _bring_slice(
                inner_desc,
                adapter_desc,
                rows_smem,
                matrices_smem,
                ready,
                slot,
                row,
                last,
                0,
                right_row,
                right_column,
            )
            count += 1
        tile += gl.num_programs(0)
        expert, row, column, last, total = place(tile, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)


@gluon.jit
def _multiply(
    group,
    rows_smem,
    matrices_smem,
    ready,
    free,
    ends_ptr,
    output_ptr,
    wide,
    slices,
    EXPERTS: gl.constexpr,
    TURNED: gl.constexpr,
):
    """One group's 64 rows of tile after tile."""
    width = wide * COLUMNS
    tile = gl.program_id(0)
    _, row, column, last, total = place(tile, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
    count = 0
    while tile < total:
        row += group * ROWS
        if row < last:
            low = gl.zeros([ROWS, HALF], gl.float32, RESULT)
            high = gl.zeros([ROWS, HALF], gl.float32, RESULT)
            for step in range(slices):
                slot = count % STAGES
                mbarrier.wait(ready.index(slot), (count // STAGES) & 1)
                left = rows_smem.index(slot * GROUPS + group)
                right = matrices_smem.index(slot)
                if TURNED:
                    low = warpgroup_mma(left, right.slice(0, HALF, dim=0).permute((1, 0)), low, is_async=True)
                    high = warpgroup_mma(left, right.slice(HALF, HALF, dim=0).permute((1, 0)), high, is_async=True)
                else:
                    low = warpgroup_mma(left, right.slice(0, HALF, dim=1), low, is_async=True)
                    high = warpgroup_mma(left, right.slice(HALF, HALF, dim=1), high, is_async=True)
                # The slice before this one: it is done once no more than two products are under way.
                low, high = warpgroup_mma_wait(2, deps=[low, high])
                mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1, pred=step > 0)
                count += 1
            low, high = warpgroup_mma_wait(0, deps=[low, high])
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
            rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, RESULT))
            columns = column + gl.arange(0, HALF, layout=gl.SliceLayout(0, RESULT))
            places = output_ptr + rows[:, None].to(gl.int64) * width + columns[None, :]
            inside = (rows < last)[:, None]
            gl.store(places, low.to(output_ptr.dtype.element_ty), mask=inside)
            gl.store(places + HALF, high.to(output_ptr.dtype.element_ty), mask=inside)
        else:
            # Nothing to do but to say so, slice by slice: said before its turn it would count for an earlier one.
            for _ in range(slices):
                slot = count % STAGES
                mbarrier.wait(ready.index(slot), (count // STAGES) & 1)
                mbarrier.arrive(free.index(slot), count=1)
                count += 1
        tile += gl.num_programs(0)
        _, row, column, last, total = place(tile, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)


@gluon.jit
def _product_kernel(
    rows_desc,
    matrices_desc,
    inner_desc,
    adapter_desc,
    ends_ptr,
    output_ptr,
    wide,
    steps,
    rank,
    EXPERTS: gl.constexpr,
    TURNED: gl.constexpr,
    ADAPTER: gl.constexpr,
):
    """As many programs as the GPU runs at once take tile after tile."""
    kind: gl.constexpr = rows_desc.dtype
    block: gl.constexpr = [STAGES] + matrices_desc.block_shape  # noqa: RUF005 - the compiler knows no star
    rows_smem = gl.allocate_shared_memory(kind, [STAGES * GROUPS, ROWS, DEPTH], rows_desc.layout)
    matrices_smem = gl.allocate_shared_memory(kind, block, matrices_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    fence_async_shared()
    slices = steps + ADAPTER
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    rows_smem,
                    matrices_smem,
                    ready,
                    free,
                    ends_ptr,
                    output_ptr,
                    wide,
                    slices,
                    EXPERTS,
                    TURNED,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    rows_smem,
                    matrices_smem,
                    ready,
                    free,
                    ends_ptr,
                    output_ptr,
                    wide,
                    slices,
                    EXPERTS,
                    TURNED,
                ),
            ),
            (
                _multiply,
                (
                    2,
                    rows_smem,
                    matrices_smem,
                    ready,
                    free,
                    ends_ptr,
                    output_ptr,
                    wide,
                    slices,
                    EXPERTS,
                    TURNED,
                ),
            ),
            (
                _bring,
                (
                    rows_desc,
                    matrices_desc,
                    inner_desc,
                    adapter_desc,
                    rows_smem,
                    matrices_smem,
                    ready,
                    free,
                    ends_ptr,
                    wide,
                    steps,
                    rank,
                    EXPERTS,
                    TURNED,
                    ADAPTER,
                ),
            ),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )


def fits(width: int, depth: int, rank: int) -> bool:
    """Whether `grouped_product` takes matrices of this size, n and k, and an adapter of this rank, 0 for none."""
    return width % COLUMNS.value == 0 and depth % DEPTH.value == 0 and rank % 8 == 0 and rank <= DEPTH.value


def grouped_product(
    rows: Tensor,
    matrices: Tensor,
    ends: Tensor,
    *,
    turned: bool,
    inner: Tensor | None = None,
    adapter: Tensor | None = None,
) -> Tensor:
    """rows [tokens, k] · matrices, [experts, n, k] turned or [experts, k, n] as they are → [tokens, n], all bf16.

    Plus inner [tokens, r] times adapter, [experts, n, r] turned or [experts, r, n], where given; sums are fp32. Sizes
    as `fits` says, all contiguous; ends: grouped.py.
    """
    tokens, depth = rows.shape
    experts = matrices.shape[0]
    width = matrices.shape[1] if turned else matrices.shape[2]
    output = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens == 0:
        return output
    wide = width // COLUMNS.value
    most = (-(-tokens // (GROUPS.value * ROWS.value)) + experts - 1) * wide
    programs = min(torch.cuda.get_device_properties(rows.device).multi_processor_count, most)
    lefts, rights = [rows], [matrices]
    if inner is not None and adapter is not None:
        lefts.append(inner)
        rights.append(adapter)
    block = [COLUMNS.value, DEPTH.value] if turned else [DEPTH.value, COLUMNS.value]
    left_descs = [TensorDescriptor.from_tensor(each, [ROWS.value, DEPTH.value], SHARED) for each in lefts]
    right_descs = [TensorDescriptor.from_tensor(each.view(-1, each.shape[2]), block, SHARED) for each in rights]
    _product_kernel[(programs,)](
        left_descs[0],
        right_descs[0],
        left_descs[-1],
        right_descs[-1],
        ends,
        output,
        wide,
        depth // DEPTH.value,
        lefts[-1].shape[1],
        EXPERTS=experts,
        TURNED=turned,
        ADAPTER=len(lefts) > 1,
        num_warps=4,
    )
    return output

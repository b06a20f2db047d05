"""Grouped products in bf16 for Hopper, with an adapter's part in the same sum. Imported only where a GPU is.

    output [tokens, n] = rows [tokens, k] · Wᵀ, W [experts, n, k]       forward
    output [tokens, n] = rows [tokens, k] · W,  W [experts, k, n]       gradient of the rows
    … + inner [tokens, r] · the adapter's other half of each expert

Rows are ragged: an expert's last tile is rarely full. A tile is 64 rows for each group of four warps × 256; a group
without rows of its own does nothing. One warp brings slices of both operands to shared memory, the groups multiply
them. Which is best depends on how many rows an expert has:

    three groups, 192 rows    up to some 150: most experts' rows are one tile, and each weight is read once
    two groups, 128 rows      above that: less is lost at each expert's end

Tiles rarely come out even with the GPU's multiprocessors: of 560 tiles 132 programs take four each, and 32 are left. A
round of their own would cost as much as the others, with three in four idle. With two groups what is left is shared out
instead: each program takes as many slices of the sum as any other, at most from two tiles, and a second kernel adds up
(Stream-K: Osama et al. 2023; here in an order that does not depend on who is done first).

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

ROWS = gl.constexpr(64)
"""Of one group."""
COLUMNS = gl.constexpr(256)
DEPTH = gl.constexpr(64)
"""Of the sum at a time, a slice: 128 bytes of a row, which is what TMA swizzles."""
SHARING_GROUPS = gl.constexpr(2)
"""Those that share out what is left, and have registers for instructions of all columns of a tile."""
MOST_PIECES = gl.constexpr(8)
"""Of a tile that is shared out; more would be longer in adding up than they save."""
ADDED_ROWS = gl.constexpr(32)
"""Of a tile, by one program of those that add up."""

SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# Of a result four neighbouring lanes hold two columns each of every eight; when it is stored, eight in a row.
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
ADDED = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))


@gluon.jit
def _shared_out(total, programs, GROUPS: gl.constexpr):
    """Of so many tiles the first that is shared out, and by how many programs what is left from there is done."""
    whole = (total // programs) * programs
    rest = total - whole
    # A last round that is nearly full is a round.
    whole = gl.where((rest * 10 > programs * 9) | (GROUPS != SHARING_GROUPS), total, whole)
    return whole, gl.minimum(programs, (total - whole) * MOST_PIECES)


@gluon.jit
def _share(program, rest, slices, sharers):
    """Where the share of a program begins and ends in all slices of what is shared out, tile after tile."""
    return program * rest * slices // gl.maximum(sharers, 1), (program + 1) * rest * slices // gl.maximum(sharers, 1)


@gluon.jit
def _work(turn, total, slices, GROUPS: gl.constexpr):
    """What this program does at its turn: the tile, its first slice and the one behind its last (none: nothing is left
    to do), and which of the program's two pieces of tiles that is, -1 for a whole tile."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    whole, sharers = _shared_out(total, programs, GROUPS)
    tile = turn * programs + program
    piece = turn - (whole - program + programs - 1) // programs
    begin, end = _share(program, total - whole, slices, sharers)
    behind = (begin // slices + 1) * slices
    first = gl.where(piece == 0, begin, behind)
    last = gl.where(piece == 0, gl.minimum(end, behind), end)
    last = gl.where((piece > 1) | (program >= sharers), first, last)
    number = first // slices
    is_whole = piece < 0
    tile = gl.where(is_whole, tile, whole + number)
    return (
        tile,
        gl.where(is_whole, 0, first - number * slices),
        gl.where(is_whole, slices, last - number * slices),
        gl.where(is_whole, -1, piece),
    )


@gluon.jit
def _bring_slice(left_desc, right_desc, memory, slot, row, last, start, right_row, right_column, GROUPS: gl.constexpr):
    """One slice of both operands. Rows of the next expert may come along: what they give is not stored."""
    left_smem, right_smem, ready, _ = memory
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
    operands,
    memory,
    ends_ptr,
    sizes,
    EXPERTS: gl.constexpr,
    TURNED: gl.constexpr,
    ADAPTER: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    rows_desc, matrices_desc, inner_desc, adapter_desc = operands
    _, _, _, free = memory
    wide, steps, rank = sizes
    slices = steps + ADAPTER
    _, _, _, _, total = place(0, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
    turn = 0
    tile, begin, end, _ = _work(turn, total, slices, GROUPS)
    count = 0
    while begin < end:
        expert, row, column, last, _ = place(tile, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
        right_row = expert * wide * COLUMNS + column
        right_column = column
        for step in range(begin, gl.minimum(end, steps)):
            slot = count % STAGES
            mbarrier.wait(free.index(slot), ((count // STAGES) & 1) ^ 1)
            if TURNED:
                right_column = step * DEPTH
            else:
                right_row = (expert * steps + step) * DEPTH
            _bring_slice(
                rows_desc, matrices_desc, memory, slot, row, last, step * DEPTH, right_row, right_column, GROUPS
            )
            count += 1
        if ADAPTER and end == slices:
            slot = count % STAGES
            mbarrier.wait(free.index(slot), ((count // STAGES) & 1) ^ 1)
            if TURNED:
                right_column = 0
            else:
                right_row = expert * rank
            _bring_slice(inner_desc, adapter_desc, memory, slot, row, last, 0, right_row, right_column, GROUPS)
            count += 1
        turn += 1
        tile, begin, end, _ = _work(turn, total, slices, GROUPS)


@gluon.jit
def _store(result, output_ptr, row, last, column, width):
    stored = gl.convert_layout(result.to(output_ptr.dtype.element_ty), STORED)
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
    columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, STORED))
    places = output_ptr + rows[:, None].to(gl.int64) * width + columns[None, :]
    gl.store(places, stored, mask=(rows < last)[:, None])


@gluon.jit
def _keep(result, parts_ptr, number, LAYOUT: gl.constexpr):
    rows = number * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(parts_ptr + rows[:, None] * COLUMNS + columns[None, :], result)


@gluon.jit
def _multiply(
    group,
    work,
    EXPERTS: gl.constexpr,
    TURNED: gl.constexpr,
    ADAPTER: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One group's 64 rows of tile after tile, then its 64 rows of pieces of tiles."""
    memory, ends_ptr, output_ptr, parts_ptr, sizes = work
    rows_smem, matrices_smem, ready, free = memory
    wide, steps, _ = sizes
    # An instruction of 256 columns wants more registers than a program of three groups starts with.
    columns_at_once: gl.constexpr = COLUMNS if GROUPS == SHARING_GROUPS else COLUMNS // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns_at_once, 16])
    slices = steps + ADAPTER
    width = wide * COLUMNS
    _, _, _, _, total = place(0, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
    turn = 0
    tile, begin, end, piece = _work(turn, total, slices, GROUPS)
    count = 0
    while begin < end:
        _, row, column, last, _ = place(tile, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
        row += group * ROWS
        if row < last:
            result = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
            for step in range(begin, end):
                slot = count % STAGES
                mbarrier.wait(ready.index(slot), (count // STAGES) & 1)
                left = rows_smem.index(slot * GROUPS + group)
                right = matrices_smem.index(slot)
                if TURNED:
                    right = right.permute((1, 0))
                result = warpgroup_mma(left, right, result, is_async=True)
                # The slice before this one: it is done once no more than one product is under way.
                result = warpgroup_mma_wait(1, deps=[result])
                mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1, pred=step > begin)
                count += 1
            result = warpgroup_mma_wait(0, deps=[result])
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
            if piece < 0:
                _store(result, output_ptr, row, last, column, width)
            else:
                _keep(result, parts_ptr, (gl.program_id(0) * 2 + piece) * GROUPS + group, layout)
        else:
            # Nothing to do but to say so, slice by slice: said before its turn it would count for an earlier one.
            for _ in range(begin, end):
                slot = count % STAGES
                mbarrier.wait(ready.index(slot), (count // STAGES) & 1)
                mbarrier.arrive(free.index(slot), count=1)
                count += 1
        turn += 1
        tile, begin, end, piece = _work(turn, total, slices, GROUPS)


@gluon.jit(do_not_specialize=("wide", "steps", "rank"))
def _product_kernel(
    rows_desc,
    matrices_desc,
    inner_desc,
    adapter_desc,
    ends_ptr,
    output_ptr,
    parts_ptr,
    wide,
    steps,
    rank,
    EXPERTS: gl.constexpr,
    TURNED: gl.constexpr,
    ADAPTER: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
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
    operands = (rows_desc, matrices_desc, inner_desc, adapter_desc)
    memory = (rows_smem, matrices_smem, ready, free)
    sizes = (wide, steps, rank)
    work = (memory, ends_ptr, output_ptr, parts_ptr, sizes)
    # The compiler takes constants only where they stand in the list.
    if GROUPS == SHARING_GROUPS:
        gl.warp_specialize(
            [
                (_multiply, (0, work, EXPERTS, TURNED, ADAPTER, GROUPS, STAGES)),
                (_multiply, (1, work, EXPERTS, TURNED, ADAPTER, GROUPS, STAGES)),
                (_bring, (operands, memory, ends_ptr, sizes, EXPERTS, TURNED, ADAPTER, GROUPS, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, work, EXPERTS, TURNED, ADAPTER, GROUPS, STAGES)),
                (_multiply, (1, work, EXPERTS, TURNED, ADAPTER, GROUPS, STAGES)),
                (_multiply, (2, work, EXPERTS, TURNED, ADAPTER, GROUPS, STAGES)),
                (_bring, (operands, memory, ends_ptr, sizes, EXPERTS, TURNED, ADAPTER, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


@gluon.jit(do_not_specialize=("wide", "slices"))
def _add_up_kernel(ends_ptr, output_ptr, parts_ptr, wide, slices, EXPERTS: gl.constexpr, GROUPS: gl.constexpr):
    """ADDED_ROWS rows of a tile that was shared out: the sum of its pieces, always in the same order."""
    programs = gl.num_programs(0)
    _, _, _, _, total = place(0, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
    whole, sharers = _shared_out(total, programs, GROUPS)
    rest = total - whole
    number = gl.program_id(0)
    if number < rest:
        _, row, column, last, _ = place(whole + number, ends_ptr, wide, EXPERTS, GROUPS * ROWS, COLUMNS)
        own = gl.program_id(1) * ADDED_ROWS + gl.arange(0, ADDED_ROWS, layout=gl.SliceLayout(1, ADDED))
        columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ADDED))
        inside = (row + own < last)[:, None]
        begin = number * slices
        # The first whose share reaches into this tile, and the last.
        program = ((begin + 1) * sharers - 1) // (rest * slices)
        final = ((begin + slices) * sharers - 1) // (rest * slices)
        result = gl.zeros([ADDED_ROWS, COLUMNS], gl.float32, ADDED)
        while program <= final:
            start, end = _share(program, rest, slices, sharers)
            piece = gl.where(start < begin, 1, 0)
            places = ((program * 2 + piece) * GROUPS * ROWS + own[:, None]) * COLUMNS + columns[None, :]
            wanted = inside & (gl.maximum(start, begin) < gl.minimum(end, begin + slices))
            result += gl.load(parts_ptr + places, mask=wanted, other=0.0)
            program += 1
        places = output_ptr + (row + own)[:, None].to(gl.int64) * (wide * COLUMNS) + (column + columns)[None, :]
        gl.store(places, result.to(output_ptr.dtype.element_ty), mask=inside)


def fits(width: int, depth: int, rank: int) -> bool:
    """Whether `grouped_product` takes matrices of this size, n and k, and an adapter of this rank, 0 for none."""
    return width % COLUMNS.value == 0 and depth % DEPTH.value == 0 and rank % 8 == 0 and rank <= DEPTH.value


def grouped_product(
    rows: Tensor,
    matrices: Tensor,
    ends: Tensor,
    adapter: tuple[Tensor, Tensor] | None = None,
    *,
    turned: bool,
    groups: int,
) -> Tensor:
    """rows [tokens, k] · matrices, [experts, n, k] turned or [experts, k, n] as they are → [tokens, n], all bf16.

    Plus the adapter's part where given: inner [tokens, r] times [experts, n, r] turned or [experts, r, n]; sums are
    fp32. Sizes as `fits` says, all contiguous; ends: grouped.py. groups: 2 or 3, see above.
    """
    tokens, depth = rows.shape
    experts = matrices.shape[0]
    width = matrices.shape[1] if turned else matrices.shape[2]
    output = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens == 0:
        return output
    wide = width // COLUMNS.value
    programs = torch.cuda.get_device_properties(rows.device).multi_processor_count
    shares = groups == SHARING_GROUPS.value
    parts = rows.new_empty((programs * 2, groups * ROWS.value, COLUMNS.value) if shares else 0, dtype=torch.float32)
    lefts, rights = zip((rows, matrices), *([adapter] if adapter else []), strict=True)
    block = [COLUMNS.value, DEPTH.value] if turned else [DEPTH.value, COLUMNS.value]
    left_descs = [TensorDescriptor.from_tensor(each, [ROWS.value, DEPTH.value], SHARED) for each in lefts]
    right_descs = [TensorDescriptor.from_tensor(each.view(-1, each.shape[2]), block, SHARED) for each in rights]
    steps = depth // DEPTH.value
    _product_kernel[(programs,)](
        left_descs[0],
        right_descs[0],
        left_descs[-1],
        right_descs[-1],
        ends,
        output,
        parts,
        wide,
        steps,
        lefts[-1].shape[1],
        EXPERTS=experts,
        TURNED=turned,
        ADAPTER=adapter is not None,
        GROUPS=groups,
        STAGES=4 if shares else 3,
        num_warps=4,
    )
    if shares:
        grid = (programs, groups * ROWS.value // ADDED_ROWS.value)
        slices = steps + (adapter is not None)
        _add_up_kernel[grid](ends, output, parts, wide, slices, EXPERTS=experts, GROUPS=groups, num_warps=4)
    return output

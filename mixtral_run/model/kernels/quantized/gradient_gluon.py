"""The input gradient of quantized_mm.py, ĝ·Ŵ, from untransposed weights. Import only on machines with a GPU.

Hopper's 8-bit products need both operands contiguous along the sum, but the weights are contiguous along the inputs. An
operand may also come from registers: there the four bytes of a word are shuffled into four words, which transposes
them. So the weights are the left operand and the result is the transpose of the gradient,

    dxᵀ [in, tokens] = Ŵᵀ [in, out] · ĝᵀ [out, tokens]

and the adapter's part, Aᵀ · (the gradient of A·x), is added before the result is stored. The kernel is written in
Gluon, Triton's language of layouts (triton/experimental/gluon; Triton 3.6 to 3.8 compile it, 3.9 does not), since
Triton itself would copy such an operand through shared memory twice.

Programs are persistent; a tile is [2 * HALF, TOKENS] of the result. One warp loads slices of both operands to shared
memory; two groups of four warps multiply, each one half of the columns: one group shuffles while the other's product
runs.
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

from mixtral_run.model.kernels.quantized.tiles_gluon import place
from mixtral_run.model.kernels.selected import num_multiprocessors

TOKENS = gl.constexpr(128)
HALF = gl.constexpr(128)
"""Columns of a tile that one group of warps computes."""
DEPTH = gl.constexpr(128)
STAGES = gl.constexpr(3)
RANKS = (0, 16, 32, 64)

RESULT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=RESULT.value, k_width=4))
# The same layouts for a product in 16 bit.
RESULT_16 = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
LEFT_16 = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=RESULT_16.value, k_width=2))
FETCHED = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))

# A thread reads words of four neighboring columns, and of every 16 rows the four that LEFT assigns to it. The
# assignment of columns to rows of the product is then free: the four columns become rows m, m + 8, m + 64 and m + 72.
_PLACES = {
    "lane_bases": [[4, 0], [8, 0], [0, 4], [0, 8], [0, 16]],
    "warp_bases": [[0, 32], [0, 64]],
    "block_bases": [],
    "shape": [128, 128],
}
READ = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [16, 0], [32, 0], [64, 0]],
        **_PLACES,
    )
)
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0], [16, 0], [32, 0], [64, 0]],
        **(_PLACES | {"lane_bases": [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]}),
    )
)


@gluon.jit
def _bring(
    rows_desc,
    matrices_desc,
    rows_smem,
    low_smem,
    high_smem,
    ready,
    free,
    offsets_ptr,
    wide,
    steps,
    EXPERTS: gl.constexpr,
):
    tile = gl.program_id(0)
    expert, row, column, _, total = place(tile, offsets_ptr, wide, EXPERTS, TOKENS, 2 * HALF)
    count = 0
    while tile < total:
        for step in range(steps):
            slot = count % STAGES
            mbarrier.wait(free.index(slot), ((count // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, (TOKENS + 2 * HALF) * DEPTH)
            below = (expert * steps + step) * DEPTH
            # The tile may contain rows of the next expert; their results are not stored.
            tma.async_copy_global_to_shared(rows_desc, [row, step * DEPTH], bar, rows_smem.index(slot))
            tma.async_copy_global_to_shared(matrices_desc, [below, column], bar, low_smem.index(slot))
            tma.async_copy_global_to_shared(matrices_desc, [below, column + HALF], bar, high_smem.index(slot))
            count += 1
        tile += gl.num_programs(0)
        expert, row, column, _, total = place(tile, offsets_ptr, wide, EXPERTS, TOKENS, 2 * HALF)


@gluon.jit
def _with_adapter(
    result,
    inner_smem,
    inner_ptr,
    adapter_ptr,
    row,
    last,
    column,
    width,
    RANK: gl.constexpr,
):
    """Return result [HALF, TOKENS] + Aᵀ · (gradient of A·x)ᵀ, summed in fp32."""
    places = gl.arange(0, HALF, layout=gl.SliceLayout(1, LEFT_16))
    own = ((places >> 4) & 3) * 32 + (places & 7) * 4 + (places >> 6) * 2 + ((places >> 3) & 1)
    ranks = gl.arange(0, RANK, layout=gl.SliceLayout(0, LEFT_16))
    left = gl.load(adapter_ptr + ranks[None, :] * width + (column + own)[:, None])
    tokens = row + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, FETCHED))
    ranks = gl.arange(0, RANK, layout=gl.SliceLayout(0, FETCHED))
    inner = gl.load(inner_ptr + tokens[:, None] * RANK + ranks[None, :], mask=(tokens < last)[:, None], other=0.0)
    inner_smem.store(inner)
    fence_async_shared()
    result = gl.convert_layout(result, RESULT_16)
    return warpgroup_mma(left, inner_smem.permute((1, 0)), result)


@gluon.jit
def _multiply(
    rows_smem,
    half_smem,
    inner_smem,
    ready,
    free,
    offset,
    row_scales_ptr,
    inner_ptr,
    adapter_ptr,
    offsets_ptr,
    output_ptr,
    wide,
    steps,
    EXPERTS: gl.constexpr,
    RANK: gl.constexpr,
):
    width = wide * 2 * HALF
    tile = gl.program_id(0)
    expert, row, column, last, total = place(tile, offsets_ptr, wide, EXPERTS, TOKENS, 2 * HALF)
    count = 0
    while tile < total:
        result = gl.zeros([HALF, TOKENS], gl.float32, RESULT)
        for _ in range(steps):
            slot = count % STAGES
            mbarrier.wait(ready.index(slot), (count // STAGES) & 1)
            left = gl.reshape(half_smem.index(slot).load(READ), [DEPTH, HALF // 32, 8, 2, 2])
            left = gl.reshape(gl.permute(left, [3, 1, 4, 2, 0]), [HALF, DEPTH])
            left = gl.convert_layout(left, LEFT)
            result = warpgroup_mma(left, rows_smem.index(slot).permute((1, 0)), result, is_async=True)
            # Wait at once: the next iteration overwrites these registers. Meanwhile the product of the other half runs.
            result = warpgroup_mma_wait(0, deps=[result])
            mbarrier.arrive(free.index(slot), count=1)
            count += 1
        tokens = row + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, RESULT))
        result = result * gl.load(row_scales_ptr + tokens, mask=tokens < last, other=0.0)[None, :]
        if RANK > 0:
            adapter = adapter_ptr + expert * RANK * width
            result = _with_adapter(result, inner_smem, inner_ptr, adapter, row, last, column + offset, width, RANK)
        stored = gl.permute(gl.reshape(result, [2, HALF // 32, 2, 8, TOKENS]), [4, 1, 3, 0, 2])
        stored = gl.convert_layout(gl.reshape(stored, [TOKENS, HALF]), STORED)
        tokens = row + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, STORED))
        columns = column + offset + gl.arange(0, HALF, layout=gl.SliceLayout(0, STORED))
        places = output_ptr + tokens[:, None].to(gl.int64) * width + columns[None, :]
        gl.store(places, stored.to(output_ptr.dtype.element_ty), mask=(tokens < last)[:, None])
        tile += gl.num_programs(0)
        expert, row, column, last, total = place(tile, offsets_ptr, wide, EXPERTS, TOKENS, 2 * HALF)


@gluon.jit
def _gradient_kernel(
    rows_desc,
    matrices_desc,
    row_scales_ptr,
    inner_ptr,
    adapter_ptr,
    offsets_ptr,
    output_ptr,
    width,
    depth,
    EXPERTS: gl.constexpr,
    RANK: gl.constexpr,
):
    kind: gl.constexpr = rows_desc.dtype
    rows_smem = gl.allocate_shared_memory(kind, [STAGES, TOKENS, DEPTH], rows_desc.layout)
    low_smem = gl.allocate_shared_memory(kind, [STAGES, DEPTH, HALF], matrices_desc.layout)
    high_smem = gl.allocate_shared_memory(kind, [STAGES, DEPTH, HALF], matrices_desc.layout)
    # One buffer for each group of warps.
    wanted: gl.constexpr = RANK if RANK > 0 else 16
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * wanted, element_bitwidth=16, rank=2)
    inner_smem = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, wanted], layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    wide = width // (2 * HALF)
    steps = depth // DEPTH
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    rows_smem,
                    low_smem,
                    inner_smem.index(0),
                    ready,
                    free,
                    0,
                    row_scales_ptr,
                    inner_ptr,
                    adapter_ptr,
                    offsets_ptr,
                    output_ptr,
                    wide,
                    steps,
                    EXPERTS,
                    RANK,
                ),
            ),
            (
                _multiply,
                (
                    rows_smem,
                    high_smem,
                    inner_smem.index(1),
                    ready,
                    free,
                    HALF,
                    row_scales_ptr,
                    inner_ptr,
                    adapter_ptr,
                    offsets_ptr,
                    output_ptr,
                    wide,
                    steps,
                    EXPERTS,
                    RANK,
                ),
            ),
            (
                _bring,
                (
                    rows_desc,
                    matrices_desc,
                    rows_smem,
                    low_smem,
                    high_smem,
                    ready,
                    free,
                    offsets_ptr,
                    wide,
                    steps,
                    EXPERTS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


def fits(values: Tensor, adapter: Tensor | None) -> bool:
    """Return True if `untransposed_gradient` takes weights [experts, out, in] and an adapter [experts, rank, in] of
    these shapes.
    """
    rank = adapter.shape[1] if adapter is not None else 0
    return values.shape[1] % DEPTH.value == 0 and values.shape[2] % (2 * HALF.value) == 0 and rank in RANKS


def untransposed_gradient(
    small: Tensor, values: Tensor, row_scales: Tensor, offsets: Tensor, inner: Tensor | None, adapter: Tensor | None
) -> Tensor:
    """Return row_scales · (small · values), plus inner · adapter if given: bf16 [tokens, in].

    Args:
        small: 8 bit [tokens, out]; row_scales: fp32 [tokens].
        values: 8 bit [experts, out, in], of shapes that `fits` accepts.
        offsets: see grouped_mm.py.
        inner, adapter: bf16 [tokens, rank] and [experts, rank, in].

    All inputs are contiguous.
    """
    experts, depth, width = values.shape
    tokens = small.shape[0]
    output = torch.empty(tokens, width, dtype=torch.bfloat16, device=small.device)
    if tokens == 0:
        return output
    most = (-(-tokens // TOKENS.value) + experts - 1) * (width // (2 * HALF.value))
    programs = min(num_multiprocessors(small.device), most)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    _gradient_kernel[(programs,)](
        TensorDescriptor.from_tensor(small, [TOKENS.value, DEPTH.value], layout),
        TensorDescriptor.from_tensor(values.view(experts * depth, width), [DEPTH.value, HALF.value], layout),
        row_scales,
        inner if inner is not None else output,
        adapter if adapter is not None else output,
        offsets,
        output,
        width,
        depth,
        EXPERTS=experts,
        RANK=adapter.shape[1] if adapter is not None else 0,
        num_warps=4,
    )
    return output

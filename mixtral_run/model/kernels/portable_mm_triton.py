"""Triton kernels for grouped products on GPUs without Hopper's instructions (A100, A40): the portable set of kernels.

    output [tokens, n] = rows [tokens, k] · matrices [experts, k, n] + inner [tokens, r] · half [experts, r, n]
    output [experts, m, n] = leftᵀ · right over each expert's rows

On compute capability 8.x torch's grouped product is a loop over the experts that waits for their offsets. Here the
offsets are read on the device: a program computes a tile of one expert, and finds out which from the cumulated numbers
of tiles. The grid is as large as the worst routing needs; programs without a tile end at once. Tiles of one expert are
numbered rows first: programs that run at the same time read the same columns of the weight, which therefore come from
memory once, and an expert's rows stay in the L2 cache.

Loads are plain and asynchronous copies and `tl.dot` is what the GPU has, so that the same source runs on every GPU of
compute capability 8.0 or more. Sums are fp32. Import this module only on machines with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.requirements import HOPPER, Capability, shared_memory_bytes
from mixtral_run.model.kernels.selected import capability_of

RANKS = (16, 32, 64)
"""Ranks of an adapter whose part `grouped_product` adds in the same sum."""
VARYING = ("tokens", "max_tiles")
"""Arguments that change with every step under EP; see narrow_mm_triton.VARYING."""
OUTER_ROWS, OUTER_COLUMNS, OUTER_TOKENS = 128, 128, 32
"""A program of `outer_product` computes OUTER_ROWS x OUTER_COLUMNS numbers, in steps of OUTER_TOKENS along the sum."""


@dataclass(frozen=True)
class Tile:
    """A tile of `grouped_product`: rows and columns of the result, step along the sum, warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, capability: Capability) -> int:
        """Return the bytes of shared memory that the pipeline's operands take. Before Hopper, Triton loads the operands
        of a step into registers, and needs no memory for the stage that is being multiplied.
        """
        stages = self.stages if capability >= HOPPER else self.stages - 1
        return 2 * stages * self.depth * (self.rows + self.columns)


@dataclass(frozen=True)
class Tiles:
    """The tiles for so many rows of an expert on average. forward, gradient: for matrices whose rows, or whose columns,
    are contiguous; the fastest first, of which the first that fits in shared memory counts.
    """

    most_rows: int
    forward: tuple[Tile, ...]
    gradient: tuple[Tile, ...]


_FEW = (Tile(16, 128, 128, 4, 4), Tile(16, 64, 128, 4, 3))
_MORE = (Tile(32, 128, 128, 4, 4), Tile(32, 64, 128, 4, 3))
_SOME = (Tile(64, 128, 64, 4, 4),)
TILES = (
    Tiles(16, _FEW, _FEW),
    Tiles(32, _MORE, _MORE),
    Tiles(96, _SOME, _SOME),
    Tiles(2**31, (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4)), (Tile(128, 128, 64, 4, 4),)),
)
"""Measured on an H200 (docs/lab_notes)."""
OLDER_TILES = TILES
"""Before Hopper."""


def tile_for(tokens: int, experts: int, capability: Capability, *, gradient: bool) -> Tile:
    """Return the tile for so many rows over so many experts on a GPU of this compute capability."""
    most = shared_memory_bytes(capability)
    tiles = next(
        each for each in (TILES if capability >= HOPPER else OLDER_TILES) if tokens <= each.most_rows * experts
    )
    candidates = tiles.gradient if gradient else tiles.forward
    return next((tile for tile in candidates if tile.shared_bytes(capability) <= most), candidates[-1])


@triton.jit(do_not_specialize=VARYING)
def _grouped_product_kernel(
    rows_ptr,
    source_ptr,
    matrices_ptr,
    inner_ptr,
    half_ptr,
    offsets_ptr,
    output_ptr,
    tokens,
    width,
    depth,
    matrix_stride,
    depth_stride,
    column_stride,
    half_stride,
    rank_stride,
    half_column_stride,
    num_experts,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
):
    """Compute one tile. Rows beyond the expert's last one repeat it and are not stored."""
    column_tiles = tl.cdiv(width, COLUMNS)
    numbers = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + numbers, mask=numbers < num_experts, other=0)
    begins = tl.load(offsets_ptr + numbers - 1, mask=(numbers > 0) & (numbers < num_experts), other=0)
    tiles = tl.cdiv(tl.maximum(tl.minimum(ends, tokens) - begins, 0), ROWS) * column_tiles
    cumulated = tl.cumsum(tiles, axis=0)
    number = tl.program_id(0)
    if number >= tl.sum(tiles, axis=0):
        return
    expert = tl.sum((cumulated <= number).to(tl.int32), axis=0)
    mine = numbers == expert
    local = number - tl.sum(tl.where(mine, cumulated - tiles, 0), axis=0)
    row_tiles = tl.sum(tl.where(mine, tiles, 0), axis=0) // column_tiles
    end = tl.minimum(tl.sum(tl.where(mine, ends, 0), axis=0), tokens)
    first = tl.sum(tl.where(mine, begins, 0), axis=0) + (local % row_tiles) * ROWS
    columns = (local // row_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rows = first + tl.arange(0, ROWS)
    there = tl.minimum(rows, end - 1)
    at = there.to(tl.int64)
    if HAS_SOURCE:
        at = tl.load(source_ptr + there)
    columns_there = columns if EVEN_WIDTH else tl.minimum(columns, width - 1)
    places = tl.arange(0, DEPTH)
    left = rows_ptr + at[:, None] * depth + places[None, :]
    right = matrices_ptr + expert.to(tl.int64) * matrix_stride
    right += places[:, None].to(tl.int64) * depth_stride + columns_there[None, :].to(tl.int64) * column_stride
    result = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN_DEPTH:
            result = tl.dot(tl.load(left), tl.load(right), result)
        else:
            inside = places < depth - start
            row = tl.load(left, mask=inside[None, :], other=0.0)
            result = tl.dot(row, tl.load(right, mask=inside[:, None], other=0.0), result)
        left += DEPTH
        right += DEPTH * depth_stride
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        inner = tl.load(inner_ptr + there[:, None].to(tl.int64) * RANK + ranks[None, :])
        half = half_ptr + expert.to(tl.int64) * half_stride
        half += ranks[:, None] * rank_stride + columns_there[None, :] * half_column_stride
        result = tl.dot(inner, tl.load(half), result)
    target = output_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
    mask = (rows < end)[:, None] & (columns < width)[None, :]
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("left_width", "right_width"))
def _grouped_outer_kernel(
    left_ptr,
    right_ptr,
    offsets_ptr,
    output_ptr,
    left_width,
    right_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    expert = tl.program_id(2)
    end = tl.load(offsets_ptr + expert)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(begin, end, TOKENS):
        tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
        mine = tokens < end
        left = tl.load(
            left_ptr + tokens[None, :] * left_width + rows[:, None],
            mask=mine[None, :] & (rows < left_width)[:, None],
            other=0.0,
        )
        right = tl.load(
            right_ptr + tokens[:, None] * right_width + columns[None, :],
            mask=mine[:, None] & (columns < right_width)[None, :],
            other=0.0,
        )
        result = tl.dot(left, right, result)
    target = output_ptr + (expert.to(tl.int64) * left_width + rows[:, None]) * right_width + columns[None, :]
    mask = (rows < left_width)[:, None] & (columns < right_width)[None, :]
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=mask)


def grouped_product(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    adapter: tuple[Tensor, Tensor] | None = None,
    source: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return rows [tokens, k] · matrices [experts, k, n], plus the adapter's part if given: [tokens, n].

    Args:
        rows: contiguous.
        matrices: of any strides; one of the last two is 1, or the loads are slow.
        offsets: int32 [experts], see grouped_mm.py. Results of rows at or after the last one are undefined.
        adapter: inner [tokens, r], contiguous, and [experts, r, n] of any strides; r is one of RANKS.
        source: int64 [tokens], the index in `rows` of each token.
        tile: default `tile_for`.
    """
    tokens, depth = rows.shape[0] if source is None else source.shape[0], rows.shape[1]
    experts, _, width = matrices.shape
    output = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens == 0:
        return output
    if tile is None:
        capability = capability_of(rows.device)
        assert capability is not None, f"{rows.device} is no GPU"
        tile = tile_for(tokens, experts, capability, gradient=matrices.stride(2) == 1)
    inner, half = adapter if adapter is not None else (rows, matrices)
    # At most one tile of each expert is not full.
    row_tiles = triton.cdiv(tokens, tile.rows) + experts - 1
    _grouped_product_kernel[(row_tiles * triton.cdiv(width, tile.columns),)](
        rows,
        source if source is not None else offsets,
        matrices,
        inner,
        half,
        offsets,
        output,
        tokens,
        width,
        depth,
        *matrices.stride(),
        *half.stride(),
        experts,
        EXPERTS=triton.next_power_of_2(experts),
        RANK=inner.shape[1] if adapter is not None else 0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        HAS_SOURCE=source is not None,
        EVEN_DEPTH=depth % tile.depth == 0,
        EVEN_WIDTH=width % tile.columns == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output


def outer_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return leftᵀ · right summed over each expert's rows: left [tokens, m], right [tokens, n] → [experts, m, n].

    Both are contiguous.
    """
    rows, columns, experts = left.shape[1], right.shape[1], offsets.shape[0]
    output = torch.empty(experts, rows, columns, dtype=left.dtype, device=left.device)
    _grouped_outer_kernel[(triton.cdiv(rows, OUTER_ROWS), triton.cdiv(columns, OUTER_COLUMNS), experts)](
        left,
        right,
        offsets,
        output,
        rows,
        columns,
        ROWS=OUTER_ROWS,
        COLUMNS=OUTER_COLUMNS,
        TOKENS=OUTER_TOKENS,
        num_warps=8,
        num_stages=3,
    )
    return output

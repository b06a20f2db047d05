"""Tile scheduling of grouped products for the Gluon kernel. Import only on machines with a GPU."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place(tile, offsets_ptr, wide, EXPERTS: gl.constexpr, HIGH: gl.constexpr, WIDE: gl.constexpr):
    """Return a tile's expert, its first row and column, the end of that expert's rows, and the number of tiles.

    A tile has HIGH rows of an expert and WIDE columns; `wide` tiles cover a row.
    """
    expert = 0
    first = 0
    last = 0
    high = 1
    start = 0
    before = 0
    begin = 0
    for number in gl.static_range(EXPERTS):
        end = gl.load(offsets_ptr + number)
        count = (end - begin + HIGH - 1) // HIGH
        after = before + count * wide
        mine = (tile >= before) & (tile < after)
        expert = gl.where(mine, number, expert)
        first = gl.where(mine, begin, first)
        last = gl.where(mine, end, last)
        high = gl.where(mine, count, high)
        start = gl.where(mine, before, start)
        begin = end
        before = after
    local = tile - start
    # Tiles that read the same weights follow each other. Each column begins with another row of tiles: the last one of
    # an expert is less work, and would otherwise fall to the same programs in every round.
    down = (local + local // high) % high
    return expert, first + down * HIGH, (local // high) * WIDE, last, before

"""Which tile of a grouped product a program takes, for the kernel in Gluon. Imported only where a GPU is."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place(tile, offsets_ptr, wide, EXPERTS: gl.constexpr, HIGH: gl.constexpr, WIDE: gl.constexpr):
    """Of a tile, HIGH rows of an expert and WIDE columns, of which `wide` make a row of tiles: its expert, its first
    row and column, where that expert's rows end; and how many tiles there are."""
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
    # Those that read the same weights one after the other, beginning with another one each time: an expert's last rows
    # are less work, and would fall to the same programs round after round.
    down = (local + local // high) % high
    return expert, first + down * HIGH, (local // high) * WIDE, last, before

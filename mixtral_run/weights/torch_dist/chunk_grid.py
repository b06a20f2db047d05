"""Check the places of a tensor's chunks, which anybody may have written. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and shape of a chunk."""

_LARGEST = 2**62
_MOST_COMPARISONS = 20_000_000


def whole_numbers(values: Any) -> tuple[int, ...]:
    """Return positions, sizes or an offset as a plain tuple. Raises ValueError unless all are integers of 0 or more."""
    if not isinstance(values, tuple) or not all(type(each) is int and 0 <= each < _LARGEST for each in values):
        raise ValueError("a position or size is not a whole number")
    return tuple(values)


def are_disjoint_within(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Return True if no two chunks overlap and none reaches beyond the tensor.

    Raises ValueError for chunks of which so many lie next to each other that comparing them would take minutes.
    """
    for offset, size in boxes:
        if not len(offset) == len(size) == len(shape):
            return False
        if any(first + length > end for first, length, end in zip(offset, size, shape, strict=True)):
            return False
    filled = [box for box in boxes if 0 not in box[1]]
    if len(filled) < 2:
        return True
    if not shape:
        return False
    # Chunks are compared along the axis with the most cuts, where the fewest lie next to each other.
    axis = max(range(len(shape)), key=lambda each: len({offset[each] for offset, _ in filled}))
    near: list[Box] = []
    comparisons = 0
    for box in sorted(filled, key=lambda each: each[0][axis]):
        near = [each for each in near if each[0][axis] + each[1][axis] > box[0][axis]]
        comparisons += len(near)
        if comparisons > _MOST_COMPARISONS:
            raise ValueError("too many chunks lie next to each other")
        if any(_overlap(box, each) for each in near):
            return False
        near.append(box)
    return True


def _overlap(one: Box, other: Box) -> bool:
    return all(a < b + b_length and b < a + a_length for a, a_length, b, b_length in zip(*one, *other, strict=True))

"""Histogram of the lengths of examples, and the --seq-length and --pack to choose for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEW = 0.01
"""Share of examples that may be truncated at the length that is advised."""
PACK_ABOVE = 0.2
"""Share of padding above which packing is advised."""
STEPS = tuple(step * 2**power for power in range(7, 17) for step in (1, 1.5))
"""Lengths to choose from: 128, 192, 256, 384, … 98,304. All are multiples of 64, as kernels and TP want."""


@dataclass(frozen=True, slots=True)
class LengthRow:
    """One row of the histogram: examples of more than `above` and up to `up_to` tokens."""

    above: int
    up_to: int
    num_examples: int


@dataclass(frozen=True, slots=True)
class LengthChoice:
    """What one --seq-length makes of the examples.

    Attributes:
        seq_length: tokens of a sample.
        num_truncated: examples that are longer.
        num_unlearned: examples of which nothing that is learned is left.
        padding: share of padding without --pack.
        num_packed_rows: rows that --pack needs at least.
    """

    seq_length: int
    num_truncated: int
    num_unlearned: int
    padding: float
    num_packed_rows: int


@dataclass(frozen=True, slots=True)
class Advice:
    """The choice that is advised, and the others. pack: whether --pack is advised with it."""

    seq_length: int
    pack: bool
    choices: tuple[LengthChoice, ...]


def histogram(lengths: NDArray[np.int32]) -> tuple[LengthRow, ...]:
    """Return the numbers of examples by length, in rows that double, from the first to the last that is not empty."""
    borders = [0, *(2**power for power in range(6, 40))]
    counts, _ = np.histogram(lengths, [0.5, *(border + 0.5 for border in borders[1:])])
    filled = np.flatnonzero(counts)
    return tuple(
        LengthRow(borders[number], borders[number + 1], int(counts[number]))
        for number in range(int(filled[0]), int(filled[-1]) + 1)
    )


def advise(lengths: NDArray[np.int32], starts: NDArray[np.int32], asked: int) -> Advice:
    """Return the --seq-length and --pack to choose.

    Args:
        lengths: tokens of each example.
        starts: its first learned token.
        asked: the --seq-length of the planned run, which is among the choices.

    The length that is advised is the smallest of STEPS at which at most FEW of the examples are truncated and something
    is left to learn of each.
    """
    longest = int(lengths.max())
    fitting = [int(step) for step in STEPS if step + 1 >= longest][:1]
    candidates = [int(step) for step in STEPS if step + 1 < longest] + fitting or [int(STEPS[-1])]
    choices = {step: _choice(lengths, starts, step) for step in candidates}
    good = [
        choice
        for choice in choices.values()
        if choice.num_truncated <= FEW * len(lengths) and choice.num_unlearned == 0
    ]
    advised = good[0] if good else choices[candidates[-1]]
    shown = {advised.seq_length: advised, asked: _choice(lengths, starts, asked)}
    at = candidates.index(advised.seq_length)
    shown |= {step: choices[step] for step in candidates[max(0, at - 2) : at + 3]}
    return Advice(advised.seq_length, advised.padding > PACK_ABOVE, tuple(shown[step] for step in sorted(shown)))


def _choice(lengths: NDArray[np.int32], starts: NDArray[np.int32], seq_length: int) -> LengthChoice:
    kept = np.minimum(lengths.astype(np.int64) - 1, seq_length)
    used = int(kept.sum())
    return LengthChoice(
        seq_length=seq_length,
        num_truncated=int((lengths > seq_length + 1).sum()),
        num_unlearned=int((starts > seq_length).sum()),
        padding=1 - used / (len(lengths) * seq_length),
        num_packed_rows=-(-used // seq_length),
    )

"""Limits of --seq-length: which examples a row cannot take. `finetune`, `align` and `data check` decide by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def responses_within(starts: NDArray[np.int64], seq_length: int) -> NDArray[np.bool_]:
    """Return for each example whether something of it is learned in a row. starts: the first learned token of each."""
    within: NDArray[np.bool_] = starts <= seq_length
    return within


def response_problem(length: int, start: int) -> str:
    """Return the problem of an example of `length` tokens that is cut before its first learned token `start`."""
    return f"{length:,} tokens, {start:,} of them in the instruction; nothing of the response is left"


def positions_needed(lengths: NDArray[np.int64], *, together: bool) -> NDArray[np.int64]:
    """Return for each example the tokens of the row that it needs: n tokens are n - 1 positions with a label.

    Args:
        lengths: tokens of the two answers of each example, with their prompt, [examples, 2]; 0 for a missing answer.
        together: both answers of an example are in one row.
    """
    positions = np.maximum(lengths - 1, 0)
    needed: NDArray[np.int64] = positions.sum(axis=1, dtype=np.int64) if together else positions.max(axis=1, initial=0)
    return needed


def answers_problem(lengths: tuple[int, int]) -> str:
    """Return the problem of an example whose answers do not fit into a row. lengths: of the two answers."""
    return " and ".join(
        f"{length:,} tokens with the {name} answer"
        for length, name in zip(lengths, ("chosen", "rejected"), strict=True)
        if length
    )

"""Preferences that do not fit into a row: which do, and every line of the refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.preferences import PreferenceSamples, fitting
from tests.support.samples import arrays_by_hand


def samples_of(
    seq_length: int,
    *lengths: int,
    paired: bool = True,
    packs: bool = False,
    chosen: NDArray[np.int64] | None = None,
) -> PreferenceSamples:
    """Samples of so many tokens for each answer, of which the last one is learned; 0: no answer."""
    answers = [(range(5, 5 + each), [(each - 1, each)] if each else []) for each in lengths]
    arrays = arrays_by_hand(*answers, rows_each=2)
    return PreferenceSamples(arrays, seq_length, 2, "--data-path x", chosen, paired=paired, packs=packs, folder=Path())


@pytest.mark.parametrize(
    ("seq_length", "alone", "together"),
    [
        (3, [False, True, True, False, True], [False, False, True, False, True]),
        (4, [True, True, True, True, True], [False, False, True, True, True]),
        (5, [True, True, True, True, True], [True, False, True, True, True]),
    ],
)
def test_a_row_of_n_takes_n_and_one_tokens_and_a_pair_n_positions(
    seq_length: int, alone: list[bool], together: list[bool]
) -> None:
    """Pairs of 4 + 1, 3 + 3, 3, 4 and 2 + 1 positions."""
    answers = [(range(5, 5 + each), [(1, 2)] if each else []) for each in (5, 2, 4, 4, 4, 0, 0, 5, 3, 2)]
    arrays = arrays_by_hand(*answers, rows_each=2)
    assert fitting(arrays, seq_length, together=False).tolist() == alone
    assert fitting(arrays, seq_length, together=True).tolist() == together


def test_ten_are_listed_and_the_rest_counted() -> None:
    with pytest.raises(ConfigError) as caught:
        samples_of(3, 4, 4, *[5, 3] * 11, *[2, 6] * 12)
    error = caught.value
    assert error.what == "23 of 24 examples are longer than --seq-length 3."
    assert error.problems == (
        *(
            f"line {number}: 5 tokens with the chosen answer and 3 tokens with the rejected answer"
            for number in range(2, 12)
        ),
        "and 13 more",
    )
    assert error.where == "--data-path x"
    assert error.expected == "each answer with its prompt in a row; a part of an answer cannot be compared"
    assert error.next_command == "--seq-length 5, or --skip-bad-examples to leave them out"


@pytest.mark.parametrize(("count", "more"), [(9, ()), (10, ()), (11, ("and 1 more",))])
def test_the_number_of_more_ones_begins_behind_the_tenth(count: int, more: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        samples_of(4, *[0, 6] * count, paired=False)
    assert caught.value.problems == (
        *(f"line {number}: 6 tokens with the rejected answer" for number in range(1, min(count, 10) + 1)),
        *more,
    )
    assert caught.value.next_command == "--seq-length 5, or --skip-bad-examples to leave them out"


def test_only_examples_that_are_used_count_and_each_once() -> None:
    with pytest.raises(ConfigError) as caught:
        samples_of(4, 5, 5, 2, 2, 9, 9, 3, 7, chosen=np.asarray([3, 0, 3, 1]))
    assert caught.value.what == "1 of 3 examples is longer than --seq-length 4."
    assert caught.value.problems == ("line 4: 3 tokens with the chosen answer and 7 tokens with the rejected answer",)
    assert str(caught.value.next_command).startswith("--seq-length 6, ")
    assert len(samples_of(4, 5, 5, 2, 2, 9, 9, 3, 7, chosen=np.asarray([1, 0]))) == 2


def test_both_answers_of_a_pair_share_a_row_under_pack_alone() -> None:
    """Pairs of 3 + 2, 1 + 2 and 3 + 3 positions."""
    lengths = (4, 3, 2, 3, 4, 4)
    with pytest.raises(ConfigError) as caught:
        samples_of(5, *lengths, packs=True)
    assert caught.value.what == "1 of 3 examples is longer than --seq-length 5."
    assert caught.value.problems == ("line 3: 4 tokens with the chosen answer and 4 tokens with the rejected answer",)
    assert caught.value.expected == (
        "both answers of a pair in one row, because of --pack; a part of an answer cannot be compared"
    )
    assert caught.value.next_command == "--seq-length 6, or --skip-bad-examples to leave them out, or without --pack"
    assert len(samples_of(6, *lengths, packs=True)) == 3
    # Neither two rows nor single answers need it.
    assert len(samples_of(3, *lengths)) == 3 and len(samples_of(5, *lengths, paired=False, packs=True)) == 3

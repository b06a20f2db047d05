"""Samples of preferences, with every row, mask, span and count written out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_run.train.data.preferences import PreferenceSamples, _previous_answers
from mixtral_run.train.data.samples import Answers, MicroBatch, batches
from tests.support.samples import arrays_by_hand

PAD = 2
# Prompts of 2, 1 and 3 tokens. The rejected answer of the first is followed by a token that is not learned, and the
# chosen one of the third has two learned spans.
PAIRS = (
    ([10, 11, 12, 13, 14], [(2, 5)]),
    ([10, 11, 15, 9], [(2, 3)]),
    ([20, 21], [(1, 2)]),
    ([20, 22, 23], [(1, 3)]),
    ([30, 31, 32, 33, 34, 35], [(3, 4), (5, 6)]),
    ([30, 31, 32, 36], [(3, 4)]),
)


def samples_of(seq_length: int, *answers: Any, **changes: Any) -> PreferenceSamples:
    given: dict[str, Any] = {"chosen": None, "paired": True, "packs": False, "folder": Path(), **changes}
    chosen = given.pop("chosen")
    arrays = arrays_by_hand(*(answers or PAIRS), rows_each=2)
    return PreferenceSamples(arrays, seq_length, PAD, "--data-path x", chosen, **given)


def answers_of(micro: MicroBatch) -> Answers:
    assert micro.answers is not None
    return micro.answers


def rows_of(micro: MicroBatch) -> list[tuple[list[int], list[int], list[float]]]:
    """Tokens, labels and mask of each row."""
    parts = (micro.tokens.tolist(), micro.labels.tolist(), micro.loss_mask.tolist())
    return list(zip(*parts, strict=True))


def test_a_pair_is_two_rows() -> None:
    samples = samples_of(5)
    assert len(samples) == 3
    micro = samples.micro_batch([2, 0])
    assert rows_of(micro) == [
        ([30, 31, 32, 33, 34], [31, 32, 33, 34, 35], [0, 0, 1, 0, 1]),
        ([30, 31, 32, 36, PAD], [31, 32, 36, PAD, PAD], [0, 0, 1, 0, 0]),
        ([10, 11, 12, 13, 14], [11, 12, 13, 14, PAD], [0, 1, 1, 1, 0]),
        ([10, 11, 15, 9, PAD], [11, 15, 9, PAD, PAD], [0, 1, 0, 0, 0]),
    ]
    assert micro.lengths is None and micro.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    answers = answers_of(micro)
    assert answers.is_chosen.tolist() == [True, False, True, False]
    assert answers.counts.tolist() == [1.0] * 4 and answers.counts.dtype == torch.float64
    assert answers.reference.tolist() == [0.0] * 4 and answers.reference.dtype == torch.float64
    assert answers.num_tokens.tolist() == [2, 1, 3, 1]
    assert answers.text_mask.tolist() == [[1, 1, 1, 1, 1], [0] * 5, [1, 1, 1, 1, 0], [0] * 5]
    assert (answers.spans, answers.answer_spans, answers.mismatched) == (None, None, None)
    assert [samples.entries_of(index) for index in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [samples.num_loss_tokens(index) for index in range(3)] == [1, 1, 1]
    assert [samples.num_text_tokens(index) for index in range(3)] == [4, 1, 5]
    assert [samples.kind_of(answer) for answer in range(4)] == ["chosen", "rejected", "chosen", "rejected"]


def test_a_sample_that_is_missing_is_the_first_one_without_a_loss() -> None:
    samples = samples_of(5)
    samples.reference = np.asarray([math.nan, math.nan, -3.0, -4.0, -5.0, -6.0])
    micro = samples.micro_batch([None, 1])
    assert rows_of(micro) == [
        ([10, 11, 12, 13, 14], [11, 12, 13, 14, PAD], [0] * 5),
        ([10, 11, 15, 9, PAD], [11, 15, 9, PAD, PAD], [0] * 5),
        ([20, 21, PAD, PAD, PAD], [21, PAD, PAD, PAD, PAD], [1, 0, 0, 0, 0]),
        ([20, 22, 23, PAD, PAD], [22, 23, PAD, PAD, PAD], [1, 1, 0, 0, 0]),
    ]
    answers = answers_of(micro)
    assert answers.counts.tolist() == [0.0, 0.0, 1.0, 1.0] and answers.reference.tolist() == [0.0, 0.0, -3.0, -4.0]
    assert answers.text_mask.tolist() == [[0] * 5, [0] * 5, [1, 0, 0, 0, 0], [0] * 5]


def test_pairs_that_share_a_row() -> None:
    """Pairs of 7, 3 and 8 positions: the third and the second fill a row of 11, the first has one with padding."""
    samples = samples_of(11, packs=True)
    assert len(samples) == 2 and [samples.entries_of(index) for index in range(2)] == [[4, 5, 2, 3], [0, 1]]
    micro = samples.micro_batch([1, 0])
    assert rows_of(micro) == [
        (
            [10, 11, 12, 13, 10, 11, 15, PAD, PAD, PAD, PAD],
            [11, 12, 13, 14, 11, 15, 9, PAD, PAD, PAD, PAD],
            [0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0],
        ),
        (
            [30, 31, 32, 33, 34, 30, 31, 32, 20, 20, 22],
            [31, 32, 33, 34, 35, 31, 32, 36, 21, 22, 23],
            [0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1],
        ),
    ]
    assert micro.lengths == ((4, 3, 4), (5, 3, 1, 2))
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1]]
    answers = answers_of(micro)
    assert answers.is_chosen.tolist() == [True, False] * 3 and answers.counts.tolist() == [1.0] * 6
    assert answers.num_tokens.tolist() == [3, 1, 2, 1, 1, 2]
    assert answers.spans is not None and answers.spans.tolist() == [4, 3, 4, 5, 3, 1, 2]
    assert answers.answer_spans is not None and answers.answer_spans.tolist() == [0, 1, 3, 4, 5, 6]
    assert answers.text_mask.tolist() == [[1, 1, 1, 1, *[0] * 7], [1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0]]
    assert [samples.num_loss_tokens(index) for index in range(2)] == [2, 1]
    assert [samples.num_text_tokens(index) for index in range(2)] == [6, 4]
    # A row that only fills a pass keeps its lengths, by which attention is separated.
    missing = samples.micro_batch([None, 1])
    assert missing.lengths == ((5, 3, 1, 2), (4, 3, 4)) and missing.loss_mask[0].sum() == 0
    assert answers_of(missing).counts.tolist() == [0.0] * 4 + [1.0] * 2
    assert answers_of(missing).text_mask.tolist() == [[0] * 11, [1, 1, 1, 1, *[0] * 7]]


def test_single_answers_are_all_chosen_ones_and_then_all_rejected_ones() -> None:
    samples = samples_of(5, paired=False)
    assert len(samples) == 6 and [samples.entries_of(index) for index in range(6)] == [[0], [2], [4], [1], [3], [5]]
    assert [samples.kind_of(answer) for answer in range(6)] == ["desirable"] * 3 + ["undesirable"] * 3
    assert [samples.num_text_tokens(index) for index in range(6)] == [4, 1, 5, 0, 0, 0]
    micro = samples.micro_batch([1, 3, None])
    assert rows_of(micro) == [
        ([20, 21, PAD, PAD, PAD], [21, PAD, PAD, PAD, PAD], [1, 0, 0, 0, 0]),
        ([10, 11, 15, 9, PAD], [11, 15, 9, PAD, PAD], [0, 1, 0, 0, 0]),
        ([10, 11, 12, 13, 14], [11, 12, 13, 14, PAD], [0] * 5),
    ]
    answers = answers_of(micro)
    assert answers.is_chosen.tolist() == [True, False, True] and answers.counts.tolist() == [1.0, 1.0, 0.0]
    assert answers.text_mask.tolist() == [[1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert answers.num_tokens.tolist() == [1, 1, 3] and answers.mismatched is None


def test_single_answers_that_share_a_row() -> None:
    """Positions 4, 1, 5, 3, 2, 3 in rows of 7: 5 + 2, then 4 + 3, then 3 + 1."""
    samples = samples_of(7, paired=False, packs=True)
    assert [samples.entries_of(index) for index in range(len(samples))] == [[4, 3], [0, 1], [5, 2]]
    micro = samples.micro_batch([2, 0, 1])
    assert micro.lengths == ((3, 1, 3), (5, 2), (4, 3))
    answers = answers_of(micro)
    assert answers.is_chosen.tolist() == [False, True, True, False, True, False]
    assert answers.answer_spans is not None and answers.answer_spans.tolist() == [0, 1, 3, 4, 5, 6]
    assert answers.text_mask.tolist() == [[0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert [samples.num_text_tokens(index) for index in range(3)] == [5, 4, 1]


def test_each_prompt_with_the_answer_before_it() -> None:
    samples = samples_of(5, paired=False)
    samples.mismatched_reference = np.asarray([-1.0, -2.0, -3.0, -4.0, math.nan, -6.0])
    entries, counts = np.asarray([0, 2, 4, 1, 3, 5]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]).double()
    micro = samples.mismatched(entries, counts)
    assert rows_of(micro) == [
        ([10, 11, PAD, PAD, PAD], [11, 36, PAD, PAD, PAD], [0, 1, 0, 0, 0]),
        ([20, 12, 13, PAD, PAD], [12, 13, 14, PAD, PAD], [1, 1, 1, 0, 0]),
        ([30, 31, 32, PAD, PAD], [31, 32, 21, PAD, PAD], [0, 0, 1, 0, 0]),
        ([10, 11, 33, 34, PAD], [11, 33, 34, 35, PAD], [0, 1, 0, 1, 0]),
        ([20, 15, PAD, PAD, PAD], [15, 9, PAD, PAD, PAD], [1, 0, 0, 0, 0]),
        ([30, 31, 32, 22, PAD], [31, 32, 22, 23, PAD], [0, 0, 1, 1, 0]),
    ]
    answers = answers_of(micro)
    assert answers.is_chosen.tolist() == [True] * 6 and torch.equal(answers.counts, counts)
    assert answers.reference.tolist() == [-1.0, -3.0, 0.0, -2.0, -4.0, -6.0]
    assert answers.num_tokens.tolist() == [1, 3, 1, 2, 1, 2] and answers.text_mask.sum() == 0
    assert (micro.lengths, answers.spans, answers.answer_spans) == (None, None, None)
    both = answers_of(samples.micro_batch([3, None]))
    assert both.mismatched is not None and answers_of(both.mismatched).reference.tolist() == [-2.0, 0.0]
    assert both.mismatched.tokens.tolist() == [[10, 11, 33, 34, PAD], [10, 11, PAD, PAD, PAD]]


@pytest.mark.parametrize("seq_length", [5, 6])
def test_a_prompt_with_another_answer_is_cut_at_the_end_of_a_row(seq_length: int) -> None:
    """A prompt of 5 tokens and an answer of 5, whose second learned part begins behind the row."""
    long = ([50, 51, 52, 53, 54, 55], [(5, 6)])
    samples = samples_of(
        seq_length, long, ([], []), ([7, 60, 61, 62, 63, 64], [(1, 3), (4, 6)]), ([], []), paired=False
    )
    micro = samples.mismatched(np.asarray([0, 2]), torch.ones(2).double())
    cut = [51, 52, 53, 54, 60, 61][:seq_length]
    assert micro.labels.tolist()[0] == cut and micro.tokens.tolist()[0] == [50, *cut[:-1]]
    assert micro.loss_mask.tolist() == [[0, 0, 0, 0, 1, 1][:seq_length], [1, *[0] * (seq_length - 1)]]
    assert micro.labels.tolist()[1] == [55, *[PAD] * (seq_length - 1)]
    assert answers_of(micro).num_tokens.tolist() == [seq_length - 4, 1]


@pytest.mark.parametrize(
    ("multiple", "entries", "lengths"),
    [
        ({}, [0, 2], (2, 3)),
        ({"row_multiple": 5}, [0, 2], (2, 3)),
        ({"row_multiple": 16}, [2, 4], (3, 3, 10)),
        ({"row_multiple": 4}, [1, 5, 0], (4, 4, 2, 2)),
    ],
)
def test_the_row_of_packed_mismatched_answers_is_as_long_as_it_must_be(
    multiple: dict[str, int], entries: list[int], lengths: tuple[int, ...]
) -> None:
    samples = samples_of(11, paired=False, packs=True, **multiple)
    micro = samples.mismatched(np.asarray(entries), torch.ones(len(entries)).double())
    assert micro.lengths == (lengths,) and micro.tokens.shape == (1, sum(lengths))
    answers = answers_of(micro)
    assert answers.spans is not None and answers.spans.tolist() == list(lengths)
    assert answers.answer_spans is not None and answers.answer_spans.tolist() == list(range(len(entries)))
    assert micro.tokens.tolist()[0][sum(lengths[: len(entries)]) :] == [PAD] * sum(lengths[len(entries) :])


def test_the_answer_before_each_in_a_circle() -> None:
    """Chosen ones are of even number. An answer of one token is an answer too, and what is empty has none before it."""
    assert _previous_answers(np.asarray([5, 4, 2, 3, 6, 4])).tolist() == [5, 4, 0, 1, 2, 3]
    assert _previous_answers(np.asarray([1, 0, 0, 3, 7, 0])).tolist() == [3, -1, -1, 4, 0, -1]


def test_some_of_the_examples_and_those_that_were_chosen() -> None:
    samples = samples_of(5, chosen=np.asarray([2, 0, 2]))
    assert [samples.entries_of(index) for index in range(3)] == [[4, 5], [0, 1], [4, 5]]
    everything = samples_of(5)
    chosen = everything.chosen_examples
    assert chosen is not None and chosen is not everything.examples
    assert [chosen.example(index).tokens for index in range(len(chosen))] == [
        tuple(PAIRS[entry][0]) for entry in (0, 2, 4)
    ]
    empty: tuple[list[int], list[tuple[int, int]]] = ([], [])
    desirable = samples_of(5, PAIRS[0], empty, PAIRS[2], empty, paired=False)
    assert desirable.chosen_examples is desirable.examples and len(desirable) == 2
    undesirable = samples_of(5, empty, PAIRS[1], empty, PAIRS[3], paired=False)
    assert undesirable.chosen_examples is None and len(undesirable) == 2
    mixed = samples_of(5, empty, PAIRS[1], PAIRS[2], empty, empty, PAIRS[3], paired=False)
    assert [mixed.entries_of(index) for index in range(len(mixed))] == [[2], [1], [5]]
    # The chosen answer has one token, which nothing predicts; it is an answer all the same.
    assert len(samples_of(5, ([5], [(0, 1)]), empty, PAIRS[2], empty, paired=False)) == 2
    assert undesirable.remarks() == ["No answer is desirable: kto learns from both kinds."]
    assert desirable.remarks() == ["No answer is undesirable: kto learns from both kinds."]
    assert mixed.remarks() == everything.remarks() == samples_of(5, chosen=np.asarray([1])).remarks() == []
    alone = samples_of(5, empty, PAIRS[1], paired=False).remarks()
    assert alone == [
        "No answer is desirable: kto learns from both kinds.",
        "There is one answer only: kto's KL needs the answers of other prompts.",
    ]


@pytest.mark.parametrize(
    ("seq_length", "changes", "text"),
    [
        (5, {}, "3 pairs, 24 tokens (10 in answers); longest 6 tokens, seq_length 5"),
        (11, {"packs": True}, "3 pairs packed into 2 rows, 24 tokens (10 in answers); longest 6 tokens, seq_length 11"),
        (
            5,
            {"paired": False},
            "6 answers (3 desirable, 3 not), 24 tokens (10 in answers); longest 6 tokens, seq_length 5",
        ),
    ],
)
def test_the_line_about_preferences(seq_length: int, changes: dict[str, bool], text: str) -> None:
    samples = samples_of(seq_length, **changes)
    assert samples.describe() == text
    assert (samples.num_loss_tokens_total, samples.seq_length) == (10, seq_length)
    empty: tuple[list[int], list[tuple[int, int]]] = ([], [])
    four = samples_of(5, PAIRS[0], empty, empty, PAIRS[1], PAIRS[2], empty, PAIRS[4], empty, paired=False)
    assert four.describe().startswith("4 answers (3 desirable, 1 not), 17 tokens (7 in answers); longest 6 tokens")


def test_a_global_batch_counts_pairs_and_the_labels_of_chosen_texts() -> None:
    (batch,) = [next(batches(samples_of(5), seed=1, micro_batch_size=1, global_batch_size=3))]
    assert (batch.num_loss_tokens, batch.num_text_tokens, batch.consumed_samples) == (3, 10, 3)
    assert [len(micro.tokens) for micro in batch.micro_batches] == [2, 2, 2]

"""Rows, counts, orders and packing of examples, with every value written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mixtral_run.errors import ConfigError
from mixtral_run.model.attention.packed_attention import PackedSizes
from mixtral_run.train.data.packing import PackedSamples, joined_row
from mixtral_run.train.data.samples import (
    ExampleTokens,
    GlobalBatch,
    MockSamples,
    Row,
    Samples,
    ShuffledOrder,
    _first_learned,
    _learned_tokens,
    batch_size_problems,
    batches,
    has_response,
    micro_batch,
)
from tests.support.samples import arrays_by_hand

PAD = 2
# 6 tokens with two learned spans, 8 that are truncated, 2, and 4 of which the first is learned too.
EXAMPLES: Any = (
    ([1, 70, 71, 72, 2, 60], [(2, 4), (5, 6)]),
    ([1, 80, 81, 82, 83, 84, 85, 2], [(3, 8)]),
    ([1, 5], [(1, 2)]),
    ([7, 8, 9, 6], [(0, 2)]),
)


def samples_of(seq_length: int, chosen: list[int] | None = None) -> Samples:
    numbers = None if chosen is None else np.asarray(chosen)
    return Samples(arrays_by_hand(*EXAMPLES), seq_length, PAD, "data", numbers)


def values_of(row: Row) -> tuple[list[int], list[int], list[float]]:
    return row.tokens.tolist(), row.labels.tolist(), row.loss_mask.tolist()


def test_rows_of_an_odd_and_of_an_even_length() -> None:
    odd = samples_of(5)
    assert [values_of(odd.row(index)) for index in range(4)] == [
        ([1, 70, 71, 72, 2], [70, 71, 72, 2, 60], [0, 1, 1, 0, 1]),
        ([1, 80, 81, 82, 83], [80, 81, 82, 83, 84], [0, 0, 1, 1, 1]),
        ([1, 5, PAD, PAD, PAD], [5, PAD, PAD, PAD, PAD], [1, 0, 0, 0, 0]),
        ([7, 8, 9, 6, PAD], [8, 9, 6, PAD, PAD], [1, 0, 0, 0, 0]),
    ]
    even = samples_of(6)
    assert [values_of(even.row(index)) for index in range(2)] == [
        ([1, 70, 71, 72, 2, 60], [70, 71, 72, 2, 60, PAD], [0, 1, 1, 0, 1, 0]),
        ([1, 80, 81, 82, 83, 84], [80, 81, 82, 83, 84, 85], [0, 0, 1, 1, 1, 1]),
    ]
    assert even.num_loss_tokens_of_all.tolist() == [3, 4, 1, 1]
    assert even.num_positions_of_all.tolist() == [5, 6, 1, 3]
    for length, truncated in ((7, 0), (6, 1), (5, 1), (4, 2)):
        assert samples_of(length).num_truncated == truncated


def test_counts_and_the_line_about_examples() -> None:
    samples = samples_of(5)
    assert [samples.num_loss_tokens(index) for index in range(4)] == [3, 3, 1, 1]
    assert [samples.num_positions(index) for index in range(4)] == [5, 5, 1, 3]
    assert (samples.num_tokens, samples.num_padding_tokens, samples.num_truncated) == (18, 6, 1)
    assert (samples.longest, samples.highest_id, samples.num_loss_tokens_total, len(samples)) == (8, 85, 8, 4)
    assert samples.describe() == (
        "4 examples, 18 tokens (8 count in the loss); padding 6 of 20 (30%); truncated 1; longest 8 tokens, "
        "seq_length 5"
    )
    # Of several, some perhaps twice.
    few = samples_of(5, [3, 1, 1])
    assert few.describe().startswith("3 examples, 16 tokens (7 count in the loss); padding 2 of 15 (13%); truncated 2;")
    assert [values_of(few.row(index))[0] for index in range(3)] == [
        [7, 8, 9, 6, PAD], [1, 80, 81, 82, 83], [1, 80, 81, 82, 83],
    ]  # fmt: skip


def test_an_example_as_far_as_a_row_holds_it() -> None:
    assert samples_of(5, [3, 1]).example(1) == ExampleTokens("line 2", (1, 80, 81, 82, 83, 84), ((3, 6),))
    assert samples_of(5, [2, 3]).example(0) == ExampleTokens("line 3", (1, 5), ((1, 2),))
    # A span that begins with the first token behind the row is none.
    assert samples_of(4).example(0) == ExampleTokens("line 1", (1, 70, 71, 72, 2), ((2, 4),))
    assert samples_of(5).example(0).learned == ((2, 4), (5, 6))


def test_what_is_learned_of_an_example_without_a_span() -> None:
    arrays = arrays_by_hand(EXAMPLES[0], ([1, 2, 3, 4], []), *EXAMPLES[1:])
    assert _first_learned(arrays).tolist() == [2, 4, 3, 1, 0]
    assert has_response(arrays, 2).tolist() == [True, False, False, True, True]
    assert has_response(arrays, 3).tolist() == [True, False, True, True, True]
    assert [_learned_tokens(arrays, longest).tolist() for longest in (3, 4, 9)] == [
        [1, 0, 0, 1, 1], [2, 0, 1, 1, 1], [3, 0, 5, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "more"), [(9, ()), (10, ()), (11, ("and 1 more",)), (23, ("and 13 more",))])
def test_ten_examples_without_space_for_a_response_are_listed(count: int, more: tuple[str, ...]) -> None:
    arrays = arrays_by_hand(EXAMPLES[2], *[(range(1, 7), [(5, 6)])] * count)
    with pytest.raises(ConfigError) as caught:
        Samples(arrays, 4, PAD, "--data-path x")
    assert caught.value.what == (
        f"{count} of {count + 1} examples are longer than --seq-length 4 before their response begins."
    )
    assert caught.value.problems == (
        *(
            f"line {number}: 6 tokens, 5 of them in the instruction; nothing of the response is left"
            for number in range(2, 2 + min(count, 10))
        ),
        *more,
    )
    assert caught.value.where == "--data-path x"
    assert caught.value.next_command == "a larger --seq-length, or shorter instructions"
    # Of those that are used the numbers are those of the file.
    with pytest.raises(ConfigError) as caught:
        Samples(arrays, 4, PAD, "--data-path x", np.asarray([0, 3]))
    assert caught.value.what.startswith("1 of 2 ") and caught.value.problems[0].startswith("line 4: 6 tokens, 5 of")


def test_an_order_is_shuffled_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ShuffledOrder(1000)
    assert [order.index_of(place, 5) for place in (2500, 1001, 999, 0, 1000)] == [729, 46, 914, 559, 120]
    assert [order.index_of(place, seed) for place, seed in ((0, 1234), (0, 5), (1, 1234))] == [117, 559, 947]
    made: list[object] = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda stream: made.append(stream) or real(stream))
    for place in (998, 999, 1000, 1001):
        order.index_of(place, 5)
    assert made == [(0, 5, 0), (0, 5, 1)]


def test_mock_tokens_are_those_of_earlier_releases() -> None:
    """They come from a stream of their own: with that of the shuffle, seed 5 would begin with 696, 382, 831."""
    mock = MockSamples(1000, 5, 5)
    assert values_of(mock.row(0)) == ([825, 385, 370, 918, 699], [385, 370, 918, 699, 869], [1] * 5)
    assert mock.row(1).tokens.tolist() == [158, 497, 231, 214, 269]
    assert MockSamples(1000, 4, 6).row(0).tokens.tolist() == [724, 144, 583, 914]
    assert (mock.num_loss_tokens(3), mock.index_of(7, 1), mock.seq_length) == (5, 7, 5)
    assert mock.describe() == "mock data: random tokens below 1,000, seq_length 5"


def test_a_sample_that_is_missing_is_the_first_row_without_a_loss() -> None:
    micro = micro_batch(samples_of(5), [None, 2, 0])
    assert micro.tokens.tolist() == [[1, 70, 71, 72, 2], [1, 5, PAD, PAD, PAD], [1, 70, 71, 72, 2]]
    assert micro.labels.tolist() == [[70, 71, 72, 2, 60], [5, PAD, PAD, PAD, PAD], [70, 71, 72, 2, 60]]
    assert micro.loss_mask.tolist() == [[0] * 5, [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert micro.lengths is None and micro.answers is None
    packed = micro_batch(PackedSamples(samples_of(6)), [2, None])
    assert packed.lengths == ((3, 3), (6,)) and packed.loss_mask.tolist() == [[1, 0, 0, 0, 0, 0], [0] * 6]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]


def test_a_batch_by_default_is_that_of_one_rank_from_the_first_sample() -> None:
    batch = next(batches(MockSamples(100, 3, 1), seed=1, micro_batch_size=2, global_batch_size=4))
    assert (batch.num_loss_tokens, batch.consumed_samples, batch.num_text_tokens) == (12, 4, 0)
    expected = [MockSamples(100, 3, 1).row(index).tokens.tolist() for index in range(4)]
    assert torch.cat([each.tokens for each in batch.micro_batches]).tolist() == expected
    assert [len(each.tokens) for each in batch.micro_batches] == [2, 2]
    assert GlobalBatch((), 1, 1).num_text_tokens == 0
    assert batch_size_problems(16, 4, 2) == batch_size_problems(24, 4, 3) == []
    assert batch_size_problems(14, 4, 3) == [
        "--global-batch-size: expected a multiple of 12 (--micro-batch-size 4 × 3 data-parallel processes); found 14"
    ]


def test_packed_rows_and_what_is_counted_of_them() -> None:
    """Positions 5, 6, 1 and 3 in rows of 6: the second alone, the first with the third, the last with padding."""
    packed = PackedSamples(samples_of(6))
    assert [packed.row(index).lengths for index in range(len(packed))] == [(6,), (5, 1), (3, 3)]
    assert values_of(packed.row(1)) == ([1, 70, 71, 72, 2, 1], [70, 71, 72, 2, 60, 5], [0, 1, 1, 0, 1, 1])
    assert values_of(packed.row(2)) == ([7, 8, 9, 6, PAD, PAD], [8, 9, 6, PAD, PAD, PAD], [1, 0, 0, 0, 0, 0])
    assert [packed.num_loss_tokens(index) for index in range(3)] == [4, 4, 1]
    assert packed.most == PackedSizes(3, 6)
    assert packed.describe() == (
        "4 examples packed into 3 rows of 6, 19 tokens (9 count in the loss); padding 3 of 18 (17%), unpacked 9; "
        "truncated 1"
    )
    assert PackedSamples(samples_of(20)).most == PackedSizes(5, 7)
    # Three in a row, and the padding is longer than each of them.
    assert PackedSamples(samples_of(20, [3, 2, 0])).most == PackedSizes(4, 11)
    assert PackedSamples(samples_of(6, [1])).most == PackedSizes(2, 6)


def test_one_example_in_a_row_of_its_own_is_followed_by_padding() -> None:
    """The last token has no label: it stands where the padding begins, as in a row that is not packed."""
    samples = samples_of(20)
    row = joined_row(samples, [2])
    assert values_of(row) == ([1, 5, *[PAD] * 18], [5, *[PAD] * 19], [1, *[0] * 19]) and row.lengths == (1, 19)
    both = joined_row(samples, [3, 0])
    assert both.tokens.tolist() == [7, 8, 9, 1, 70, 71, 72, 2, *[PAD] * 12] and both.lengths == (3, 5, 12)

"""Packing of examples into rows: each one once and complete, in a row with space for it, separated by lengths."""

import random
from itertools import islice
from typing import Any

import pytest
import torch

from mixtral_run.resources import INSTRUCTIONS
from mixtral_run.train.data.packing import PackedSamples, pack_lengths
from mixtral_run.train.data.samples import Samples, batches
from tests.support.examples import examples_of

SEQ = 256


@pytest.fixture(scope="module")
def samples(tiny_tokenizer: Any) -> Samples:
    return Samples(examples_of(INSTRUCTIONS), tiny_tokenizer, SEQ)


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_in_one_row_that_takes_it(seed: int) -> None:
    numbers = random.Random(seed)
    lengths = [numbers.randint(1, 100) for _ in range(300)]
    rows = pack_lengths(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(300))
    assert all(sum(lengths[item] for item in row) <= 100 for row in rows)
    # Longest first into the fullest row is never worse than 11/9 of the best, which cannot be below the sum.
    assert len(rows) <= 11 / 9 * (sum(lengths) / 100) + 5
    assert pack_lengths(lengths, 100) == rows


def test_items_that_fill_a_row_stay_alone() -> None:
    assert pack_lengths([5, 5, 5], 5) == [[0], [1], [2]]
    assert pack_lengths([3, 2, 3, 2], 5) == [[0, 1], [2, 3]]
    assert pack_lengths([], 5) == []


def test_rows_hold_the_examples_unchanged(samples: Samples) -> None:
    packed = PackedSamples(samples)
    assert len(packed) < len(samples) / 2
    found = []
    for index in range(len(packed)):
        row = packed.row(index)
        assert row.lengths is not None
        assert len(row.tokens) == len(row.labels) == len(row.loss_mask) == sum(row.lengths) == SEQ
        assert int(row.loss_mask.sum()) == packed.num_loss_tokens(index)
        start = 0
        for length in row.lengths:
            part = slice(start, start + length)
            if row.loss_mask[part].any():
                found.append((row.tokens[part].tolist(), row.labels[part].tolist(), row.loss_mask[part].tolist()))
            start += length
    expected = []
    for index in range(len(samples)):
        row, length = samples.row(index), samples.num_positions(index)
        expected.append(tuple(each[:length].tolist() for each in (row.tokens, row.labels, row.loss_mask)))
    assert sorted(found) == sorted(expected)


def test_padding_is_counted_and_less(samples: Samples) -> None:
    packed = PackedSamples(samples)
    used = sum(samples.num_positions(index) for index in range(len(samples)))
    assert packed.num_padding_tokens == len(packed) * SEQ - used
    assert packed.num_padding_tokens < samples.num_padding_tokens / 4
    text = packed.describe()
    assert f"{len(samples):,} examples packed into {len(packed):,} rows" in text
    assert f"padding {packed.num_padding_tokens:,} of {len(packed) * SEQ:,}" in text


def test_what_rows_hold_at_most(samples: Samples) -> None:
    packed = PackedSamples(samples)
    lengths = [row.lengths for row in map(packed.row, range(len(packed))) if row.lengths is not None]
    assert len({len(row) for row in lengths}) > 1
    # A full row has no padding, and one place for it is reckoned with all the same.
    most = max(len(row) for row in lengths)
    assert packed.most.samples in (most, most + 1)
    assert packed.most.longest == max(max(row) for row in lengths)


def test_positions_begin_anew(samples: Samples) -> None:
    stream = batches(PackedSamples(samples), seed=1, micro_batch_size=2, global_batch_size=4)
    for batch in islice(stream, 3):
        for micro in batch.micro_batches:
            assert micro.lengths is not None and len(micro.lengths) == 2
            for positions, lengths in zip(micro.position_ids, micro.lengths, strict=True):
                assert positions.tolist() == [place for length in lengths for place in range(length)]
        assert sum(int(micro.loss_mask.sum()) for micro in batch.micro_batches) == batch.num_loss_tokens


def test_every_layout_sees_the_same_rows(samples: Samples) -> None:
    packed = PackedSamples(samples)
    whole = next(batches(packed, seed=3, micro_batch_size=4, global_batch_size=4)).micro_batches[0]
    halves = [
        next(
            batches(packed, seed=3, micro_batch_size=1, global_batch_size=4, data_parallel_rank=r, data_parallel_size=2)
        )
        for r in range(2)
    ]
    rows = torch.cat([micro.tokens for half in halves for micro in half.micro_batches])
    assert torch.equal(rows, whole.tokens)
    lengths = tuple(row for half in halves for micro in half.micro_batches for row in micro.lengths or ())
    assert lengths == whole.lengths

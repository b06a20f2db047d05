"""Packing of examples into rows: each one once and complete, in a row with space for it, separated by lengths."""

import bisect
import hashlib
import json
import random
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_run.train.data.cache.token_arrays import TokenArrays
from mixtral_run.train.data.packing import PackedSamples, Packing, joined_row, pack_lengths
from mixtral_run.train.data.samples import Samples, batches
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.trial.sizes import INSTRUCTIONS
from tests.support.examples import examples_of
from tests.support.samples import samples_of

SEQ = 256


@pytest.fixture(scope="module")
def samples(tiny_tokenizer: Any) -> Samples:
    return samples_of(examples_of(INSTRUCTIONS), tiny_tokenizer, SEQ)


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_in_one_row_that_takes_it(seed: int) -> None:
    numbers = random.Random(seed)
    lengths = [numbers.randint(1, 100) for _ in range(300)]
    rows = rows_of(pack_lengths(lengths, 100))
    assert sorted(item for row in rows for item in row) == list(range(300))
    assert all(sum(lengths[item] for item in row) <= 100 for row in rows)
    # Longest first into the fullest row is never worse than 11/9 of the best, which cannot be below the sum.
    assert len(rows) <= 11 / 9 * (sum(lengths) / 100) + 5
    assert rows == packed_one_by_one(lengths, 100)


def rows_of(packing: Packing) -> list[list[int]]:
    return [packing.row(index).tolist() for index in range(len(packing))]


def packed_one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, item by item: what the kit did before it packed all items of one length together."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        at = bisect.bisect_left(free, (lengths[item], -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (left - lengths[item], row))
    return rows


@pytest.mark.parametrize(
    ("seed", "count", "capacity", "num_rows", "first", "middle", "digest"),
    [
        (0, 5000, 512, 1010, [94], [1029, 1100, 366], "f79ec8d35320d4ef"),
        (1, 3000, 64, 626, [660], [643, 680, 556], "ff35bf49d0b91d01"),
        (2, 2000, 2048, 395, [15], [1087, 1440, 1411], "704ebc2546a9cb7a"),
    ],
)
def test_rows_are_those_of_earlier_releases(
    seed: int, count: int, capacity: int, num_rows: int, first: list[int], middle: list[int], digest: str
) -> None:
    """Checkpoints resume in the order of rows; these numbers come from the release that packed item by item."""
    numbers = random.Random(seed)
    lengths = [min(capacity, 1 + int(numbers.expovariate(1 / (capacity / 5)))) for _ in range(count)]
    rows = rows_of(pack_lengths(lengths, capacity))
    assert (len(rows), rows[0], rows[len(rows) // 2][:6]) == (num_rows, first, middle)
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("largest", [0, 1, 3, 7, 40])
def test_few_distinct_lengths_are_packed_as_one_by_one(largest: int) -> None:
    for seed in range(20):
        numbers = random.Random(seed)
        lengths = [numbers.randint(0, largest) for _ in range(numbers.randint(1, 200))]
        assert rows_of(pack_lengths(lengths, 40)) == packed_one_by_one(lengths, 40)


def test_a_million_lengths_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 1_000_000)
    started = time.process_time()
    packing = pack_lengths(lengths, 2048)
    assert time.process_time() - started < 20
    sums = np.add.reduceat(lengths[packing.items], packing.offsets[:-1])
    assert sums.max() <= 2048 and np.array_equal(np.sort(packing.items), np.arange(1_000_000))
    assert len(packing) <= 1.02 * lengths.sum() / 2048


def test_items_that_fill_a_row_stay_alone() -> None:
    assert rows_of(pack_lengths([5, 5, 5], 5)) == [[0], [1], [2]]
    assert rows_of(pack_lengths([3, 2, 3, 2], 5)) == [[0, 1], [2, 3]]
    assert rows_of(pack_lengths([], 5)) == []


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


def test_a_joined_row_ends_in_padding_that_does_not_count() -> None:
    """Examples of 3 and 4 tokens have 2 and 3 positions; three of eight are left, and hold the id of padding alone."""
    encoded = [
        EncodedExample(np.arange(first, last, dtype=np.int32), ((0, 9),)) for first, last in ((10, 13), (20, 24))
    ]
    both = Samples(TokenArrays.of(["a", "b"], encoded), 8, padding_id=7)
    # A span that begins with the first token counts from the second one on, which no position predicts the first of.
    assert both.row(0).loss_mask.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    row = joined_row(both, [0, 1])
    assert row.tokens.tolist() == [10, 11, 20, 21, 22, 7, 7, 7]
    assert row.labels.tolist() == [11, 12, 21, 22, 23, 7, 7, 7]
    assert row.loss_mask.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]

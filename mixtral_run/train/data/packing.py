"""Packing of several examples into one row. model/packed_attention.py keeps them from attending to each other."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from mixtral_run.model.packed_attention import PackedSizes
from mixtral_run.train.data.samples import Row, Samples, ShuffledOrder


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items to rows of `capacity` tokens: best-fit decreasing, the longest item first into the fullest row.

    Deterministic. Every item of at most `capacity` tokens is in exactly one row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
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


class PackedSamples:
    """The examples of `samples`, packed into few rows. Rows are shuffled anew each epoch and keep their examples.

    Batch sizes count rows. It does not matter which examples share a row, as none attends to another.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._rows = pack_lengths([samples.num_positions(index) for index in range(len(samples))], samples.seq_length)
        self._order = ShuffledOrder(len(self._rows))
        lengths = [self._lengths(index) for index in range(len(self))]
        # The last length is that of the padding, which may be 0.
        self.num_padding_tokens = sum(row[-1] for row in lengths)
        self.most = PackedSizes(max(map(len, lengths)), max(map(max, lengths)))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def seq_length(self) -> int:
        return self._samples.seq_length

    def describe(self) -> str:
        """Return one line about the data for the start of a run."""
        capacity = len(self) * self.seq_length
        return (
            f"{len(self._samples):,} examples packed into {len(self):,} rows of {self.seq_length:,}, "
            f"{self._samples.num_tokens:,} tokens ({self._samples.num_loss_tokens_total:,} count in the loss); "
            f"padding {self.num_padding_tokens:,} of {capacity:,} ({self.num_padding_tokens / capacity:.0%}), "
            f"unpacked {self._samples.num_padding_tokens:,}; truncated {self._samples.num_truncated:,}"
        )

    def index_of(self, position: int, seed: int) -> int:
        return self._order.index_of(position, seed)

    def row(self, index: int) -> Row:
        """Return the examples one after the other, followed by the padding as a sample of its own."""
        parts = [self._samples.row(each) for each in self._rows[index]]
        *lengths, padding = self._lengths(index)
        cut = list(zip(parts, lengths, strict=True))
        if padding:
            # An example's own row ends in at least as much padding as is left here.
            cut.append((_tail(parts[-1], padding), padding))
            lengths.append(padding)
        return Row(
            np.concatenate([part.tokens[:length] for part, length in cut]),
            np.concatenate([part.labels[:length] for part, length in cut]),
            np.concatenate([part.loss_mask[:length] for part, length in cut]),
            tuple(lengths),
        )

    def _lengths(self, index: int) -> list[int]:
        """Return the lengths of a row's examples, and that of its padding, which may be 0."""
        lengths = [self._samples.num_positions(each) for each in self._rows[index]]
        return [*lengths, self.seq_length - sum(lengths)]

    def num_loss_tokens(self, index: int) -> int:
        return sum(self._samples.num_loss_tokens(each) for each in self._rows[index])


def _tail(row: Row, count: int) -> Row:
    return Row(row.tokens[-count:], row.labels[-count:], row.loss_mask[-count:])

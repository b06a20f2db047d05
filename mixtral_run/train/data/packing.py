"""Several pairs in one row. What keeps them from attending to each other is model/packed_attention.py."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from mixtral_run.model.packed_attention import PackedSizes
from mixtral_run.train.data.samples import Row, Samples, ShuffledOrder


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row of `capacity`: the longest first, each into the fullest row that still takes it.

    The same for the same lengths. Every item of at most `capacity` is in exactly one row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (places left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        at = bisect.bisect_left(room, (lengths[item], -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(room, (left - lengths[item], row))
    return rows


class PackedSamples:
    """The pairs of `samples`, as few rows as they fit into; rows are shuffled anew each epoch, pairs stay together.

    A row is a sample here: batch sizes count rows. Companions do not matter, as no pair sees another.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._rows = pack_lengths([samples.num_places(index) for index in range(len(samples))], samples.seq_length)
        self._order = ShuffledOrder(len(self._rows))
        lengths = [self._lengths(index) for index in range(len(self))]
        # The last is padding, or nothing.
        self.num_padding_tokens = sum(row[-1] for row in lengths)
        self.most = PackedSizes(max(map(len, lengths)), max(map(max, lengths)))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def seq_length(self) -> int:
        return self._samples.seq_length

    def describe(self) -> str:
        """One line for the start of a run."""
        places = len(self) * self.seq_length
        return (
            f"{len(self._samples):,} pairs packed into {len(self):,} rows of {self.seq_length:,}, "
            f"{self._samples.num_tokens:,} tokens ({self._samples.num_loss_tokens_total:,} count in the loss); "
            f"padding {self.num_padding_tokens:,} of {places:,} ({self.num_padding_tokens / places:.0%}), "
            f"unpacked {self._samples.num_padding_tokens:,}; truncated {self._samples.num_truncated:,}"
        )

    def index_of(self, position: int, seed: int) -> int:
        return self._order.index_of(position, seed)

    def row(self, index: int) -> Row:
        """The pairs one after the other, padding behind them as a sample of its own."""
        parts = [self._samples.row(pair) for pair in self._rows[index]]
        *lengths, padding = self._lengths(index)
        cut = list(zip(parts, lengths, strict=True))
        if padding:
            # A pair's own row ends in at least as much padding as is left here.
            cut.append((_tail(parts[-1], padding), padding))
            lengths.append(padding)
        return Row(
            np.concatenate([part.tokens[:length] for part, length in cut]),
            np.concatenate([part.labels[:length] for part, length in cut]),
            np.concatenate([part.loss_mask[:length] for part, length in cut]),
            tuple(lengths),
        )

    def _lengths(self, index: int) -> list[int]:
        """Tokens of a row's pairs, and of its padding, which may be none."""
        lengths = [self._samples.num_places(pair) for pair in self._rows[index]]
        return [*lengths, self.seq_length - sum(lengths)]

    def num_loss_tokens(self, index: int) -> int:
        return sum(self._samples.num_loss_tokens(pair) for pair in self._rows[index])


def _tail(row: Row, count: int) -> Row:
    return Row(row.tokens[-count:], row.labels[-count:], row.loss_mask[-count:])

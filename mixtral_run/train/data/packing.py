"""Packing of several examples into one row. They do not attend to each other (model/attention/packed_attention.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixtral_run.model.attention.packed_attention import PackedSizes
from mixtral_run.train.data.samples import Row, Samples, ShuffledOrder

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """Items assigned to rows. Row r has `items[offsets[r]:offsets[r + 1]]`, in this order."""

    items: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """Return the items of a row."""
        return self.items[self.offsets[index] : self.offsets[index + 1]]


def pack_lengths(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> Packing:
    """Assign items to rows of `capacity` tokens: best-fit decreasing, the longest item first into the fullest row.

    Deterministic. Every item, of at most `capacity` tokens, is in exactly one row. Of several rows with as much free
    space the first takes the item. All items of one length are assigned together, so that a million take seconds.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    free = _FreeRows(capacity)
    chosen = [free.take(int(length), int(count)) for length, count in zip(values[::-1], counts[::-1], strict=True)]
    row_of = np.concatenate([np.empty(0, np.int64), *chosen])
    # Within a row the items stay in the order in which they were assigned.
    by_row = np.argsort(row_of, kind="stable")
    offsets = np.zeros(free.num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=free.num_rows), out=offsets[1:])
    return Packing(order[by_row], offsets)


class _FreeRows:
    """The rows by their number of free tokens."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_free: dict[int, list[NDArray[np.int64]]] = {}
        self._values = 0  # bit f is set if a row has f free tokens
        self.num_rows = 0

    def take(self, length: int, count: int) -> NDArray[np.int64]:
        """Return the row of each of `count` items of `length` tokens, and reduce the rows' free tokens."""
        found = []
        while count:
            rows, left = self._fullest(length, count)
            # A row that took an item is now the fullest that takes the next one, as long as an item fits.
            each = left // length if length else count
            used = -(-count // each)
            rows, rest = rows[:used], rows[used:]
            taken = np.repeat(rows, each)[:count]
            found.append(taken)
            self._put(left, rest)
            full, last = (rows, 0) if count >= each * len(rows) else (rows[:-1], count - each * (len(rows) - 1))
            self._put(left - each * length, full)
            self._put(left - last * length, rows[len(full) :])
            count -= len(taken)
        return np.concatenate(found)

    def _fullest(self, length: int, count: int) -> tuple[NDArray[np.int64], int]:
        """Remove and return the rows with the fewest free tokens that take an item, in ascending order."""
        fitting = self._values >> length
        if not fitting:
            each = self._capacity // length if length else count
            new = np.arange(self.num_rows, self.num_rows + -(-count // each), dtype=np.int64)
            self.num_rows += len(new)
            return new, self._capacity
        left = length + (fitting & -fitting).bit_length() - 1
        self._values &= ~(1 << left)
        parts = self._by_free.pop(left)
        return (parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))), left

    def _put(self, left: int, rows: NDArray[np.int64]) -> None:
        if len(rows):
            self._by_free.setdefault(left, []).append(rows)
            self._values |= 1 << left


class PackedSamples:
    """The examples of `samples`, packed into few rows. Rows are shuffled anew each epoch and keep their examples.

    Batch sizes count rows. It does not matter which examples share a row, as none attends to another.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        positions = samples.num_positions_of_all
        self._rows = pack_lengths(positions, samples.seq_length)
        self._order = ShuffledOrder(len(self._rows))
        starts = self._rows.offsets[:-1]
        in_rows = positions[self._rows.items]
        # Every row has at least one example. The padding, which may be 0, counts as one more.
        padding = samples.seq_length - np.add.reduceat(in_rows, starts)
        self.num_padding_tokens = int(padding.sum())
        self.num_loss_tokens_total = samples.num_loss_tokens_total
        self._loss_tokens = np.add.reduceat(samples.num_loss_tokens_of_all[self._rows.items], starts)
        longest = max(int(in_rows.max()), int(padding.max()))
        self.most = PackedSizes(int(np.diff(self._rows.offsets).max()) + 1, longest)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def examples(self) -> Samples:
        """Return the examples, each in a row of its own."""
        return self._samples

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
        """Return `joined_row` of the examples of a row."""
        return joined_row(self._samples, self._rows.row(index).tolist())

    def num_loss_tokens(self, index: int) -> int:
        return int(self._loss_tokens[index])


def joined_row(samples: Samples, items: Sequence[int]) -> Row:
    """Return the examples one after the other in a row, followed by the padding as a sample of its own."""
    parts = [samples.row(each) for each in items]
    lengths = [samples.num_positions(each) for each in items]
    padding = samples.seq_length - sum(lengths)
    cut = list(zip(parts, lengths, strict=True))
    if padding:
        # An example's own row has no label in as many places at its end as are left here.
        cut.append((_tail(parts[-1], padding), padding))
        lengths.append(padding)
    return Row(
        np.concatenate([part.tokens[:length] for part, length in cut]),
        np.concatenate([part.labels[:length] for part, length in cut]),
        np.concatenate([part.loss_mask[:length] for part, length in cut]),
        tuple(lengths),
    )


def _tail(row: Row, count: int) -> Row:
    return Row(row.tokens[-count:], row.labels[-count:], row.loss_mask[-count:])

"""Preferences as samples: pairs of answers to one prompt, or single answers that are desirable or not.

The token cache holds two rows for each example: the prompt with the chosen answer, and with the rejected one. Of an
example with one answer and a label the other row is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixtral_run.errors import ConfigError
from mixtral_run.model.attention.packed_attention import PackedSizes
from mixtral_run.train.data.cache.token_arrays import TokenArrays
from mixtral_run.train.data.length_limits import answers_problem, positions_needed
from mixtral_run.train.data.packing import PackedSamples, Packing, joined_row, pack_lengths
from mixtral_run.train.data.reading.examples import counted
from mixtral_run.train.data.samples import (
    NUM_PROBLEMS_SHOWN,
    Answers,
    MicroBatch,
    Row,
    Samples,
    ShuffledOrder,
    stacked,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PreferenceSamples:
    """Samples of preferences. A sample is a pair of answers, or one answer; under --pack a row of several of them.

    Args:
        arrays: the encoded answers, two for each example.
        seq_length: tokens of a row.
        padding_id: any valid id.
        where: the data, for errors.
        chosen: numbers of the examples to use; None: all.
        paired: True if a sample is a pair; False if it is one answer.
        packs: put several samples into a row, both answers of a pair into the same one.
        folder: of the token cache.
        row_multiple: of which the length of every row is a multiple, so that TP can split it.

    Attributes:
        reference: log-probability of each answer of the cache by the reference model, float64 [answers of the cache];
            NaN where it is not known; None if none is needed.
        mismatched_reference: the same of each prompt with another answer; None if none is needed.
        most: the largest sizes of packed rows; None if rows are not packed.

    Raises:
        ConfigError: answers are longer than a row; their places are listed.
    """

    def __init__(
        self,
        arrays: TokenArrays,
        seq_length: int,
        padding_id: int,
        where: str,
        chosen: NDArray[np.int64] | None,
        *,
        paired: bool,
        packs: bool,
        folder: Path,
        row_multiple: int = 1,
    ) -> None:
        numbers = np.arange(len(arrays) // 2) if chosen is None else chosen
        _refuse_too_long(arrays, seq_length, where, numbers, together=packs and paired)
        lengths = np.diff(arrays.offsets)
        both = np.stack([2 * numbers, 2 * numbers + 1], axis=1)
        # Of pairs as single answers: all chosen ones, then all rejected ones, as in TRL.
        self._entries = both.reshape(-1) if paired else both.T.reshape(-1)[lengths[both.T.reshape(-1)] > 0]
        self.arrays, self.folder, self.paired = arrays, folder, paired
        self._width = 2 if paired else 1
        self._padding_id, self._row_multiple = padding_id, row_multiple
        self.examples = Samples(arrays, seq_length, padding_id, where, self._entries)
        is_chosen = self._entries % 2 == 0
        self.chosen_examples = self.examples if is_chosen.all() else self._part(is_chosen, where)
        positions = self.examples.num_positions_of_all.reshape(-1, self._width)
        self._packing = pack_lengths(positions.sum(axis=1), seq_length) if packs else None
        self.most = _most_of(self._packing, positions, seq_length) if self._packing is not None else None
        self._text_tokens = np.where(is_chosen.reshape(-1, self._width), positions, 0).sum(axis=1)
        self._order = ShuffledOrder(len(self))
        self._previous = _previous_answers(lengths) if not paired else None
        self.reference: NDArray[np.float64] | None = None
        self.mismatched_reference: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self._packing) if self._packing is not None else len(self._entries) // self._width

    @property
    def num_loss_tokens_total(self) -> int:
        """Return the number of tokens of all answers."""
        return self.examples.num_loss_tokens_total

    @property
    def seq_length(self) -> int:
        return self.examples.seq_length

    def describe(self) -> str:
        """Return one line about the data for the start of a run."""
        num_chosen = int((self._entries % 2 == 0).sum())
        what = f"{num_chosen:,} pairs"
        if not self.paired:
            what = f"{len(self._entries):,} answers ({num_chosen:,} desirable, {len(self._entries) - num_chosen:,} not)"
        packed = f" packed into {len(self):,} rows" if self._packing is not None else ""
        samples = self.examples
        return (
            f"{what}{packed}, {samples.num_tokens:,} tokens ({samples.num_loss_tokens_total:,} in answers); longest "
            f"{samples.longest:,} tokens, seq_length {self.seq_length:,}"
        )

    def remarks(self) -> list[str]:
        """Return lines about data from which little can be learned."""
        if self.paired:
            return []
        num_chosen = int((self._entries % 2 == 0).sum())
        missing = "desirable" if not num_chosen else "undesirable" if num_chosen == len(self._entries) else None
        found = [f"No answer is {missing}: kto learns from both kinds."] if missing else []
        if len(self._entries) == 1:
            found.append("There is one answer only: kto's KL needs the answers of other prompts.")
        return found

    def index_of(self, position: int, seed: int) -> int:
        return self._order.index_of(position, seed)

    def num_loss_tokens(self, index: int) -> int:
        """Return the number of pairs or answers of a sample."""
        return len(self._group(index))

    def num_text_tokens(self, index: int) -> int:
        return int(self._text_tokens[self._group(index)].sum())

    def kind_of(self, answer: int) -> str:
        """Return what an answer of `examples` is: chosen or rejected, desirable or undesirable."""
        is_chosen = self._entries[answer] % 2 == 0
        return ("chosen" if is_chosen else "rejected") if self.paired else "desirable" if is_chosen else "undesirable"

    def entries_of(self, index: int) -> list[int]:
        """Return the numbers of a sample's answers in the cache, in the order of its rows."""
        return [int(self._entries[each]) for each in self._answers_of(index)]

    def micro_batch(self, indices: Sequence[int | None]) -> MicroBatch:
        """Return samples as a micro batch. None: the rows of the first sample, of which nothing counts."""
        answers = [self._answers_of(index or 0) for index in indices]
        flat = np.asarray([each for sample in answers for each in sample], np.int64)
        counts = [float(index is not None) for index, sample in zip(indices, answers, strict=True) for _ in sample]
        rows = [
            row if index is not None else _without_loss(row)
            for index, sample in zip(indices, answers, strict=True)
            for row in self._rows(sample)
        ]
        micro = stacked(rows)
        spans, answer_spans = None, None
        if self._packing is not None:
            spans = torch.tensor([length for row in rows for length in row.lengths or ()])
            ends = np.cumsum([0, *(len(row.lengths or ()) for row in rows)])
            of_row = [begin + np.arange(len(sample)) for begin, sample in zip(ends, answers, strict=False)]
            answer_spans = torch.from_numpy(np.concatenate(of_row))
        entries = self._entries[flat]
        counted = torch.tensor(counts, dtype=torch.float64)
        return MicroBatch(
            micro.tokens, micro.labels, micro.loss_mask, micro.position_ids, micro.lengths,
            Answers(
                is_chosen=torch.from_numpy(entries % 2 == 0),
                counts=counted,
                reference=_values(self.reference, entries, counted),
                num_tokens=torch.from_numpy(self.examples.num_loss_tokens_of_all[flat]),
                text_mask=self._text_mask(rows, answers, counts),
                spans=spans,
                answer_spans=answer_spans,
                mismatched=self.mismatched(entries, counted) if self.mismatched_reference is not None else None,
            ),
        )  # fmt: skip

    def mismatched(self, entries: NDArray[np.int64], counts: torch.Tensor) -> MicroBatch:
        """Return the prompts of answers of the cache, each with the answer before it, as a micro batch.

        What is longer than a row is cut: nothing is learned from it. Under --pack all are in one row, which is as long
        as they need.
        """
        assert self._previous is not None, "pairs have no mismatched answers"
        made = [self._mismatched_row(int(entry), int(self._previous[entry])) for entry in entries]
        num_tokens = torch.tensor([int(row.loss_mask.sum()) for row in made])
        spans = None
        if self._packing is None:
            micro = stacked([self._filled(row, self.seq_length) for row in made])
        else:
            lengths = [len(row.tokens) for row in made]
            end = -(-sum(lengths) // self._row_multiple) * self._row_multiple
            padding = [end - sum(lengths)] if end > sum(lengths) else []
            whole = self._filled(_joined(made), end)
            micro = stacked([dataclasses.replace(whole, lengths=(*lengths, *padding))])
            spans = torch.tensor([*lengths, *padding])
        answers = Answers(
            is_chosen=torch.ones(len(made), dtype=torch.bool),
            counts=counts,
            reference=_values(self.mismatched_reference, entries, counts),
            num_tokens=num_tokens,
            text_mask=torch.zeros_like(micro.loss_mask),
            spans=spans,
            answer_spans=torch.arange(len(made)) if spans is not None else None,
        )
        return dataclasses.replace(micro, answers=answers)

    def _mismatched_row(self, entry: int, other: int) -> Row:
        """Return a prompt with another answer, cut at the end of a row, without padding."""
        arrays, length = self.arrays, self.seq_length + 1
        begin, other_begin = _first_learned(arrays, entry), _first_learned(arrays, other)
        prompt = arrays.tokens_of(entry, begin)
        tokens = arrays.tokens_of(other, int(arrays.offsets[other + 1] - arrays.offsets[other]))
        whole = np.concatenate([prompt, tokens[other_begin:]])[:length].astype(np.int64)
        mask = np.zeros(len(whole) - 1, dtype=np.float32)
        first, last = arrays.span_offsets[other : other + 2].tolist()
        for start, end in (arrays.spans[first:last] - other_begin + begin).tolist():
            mask[start - 1 : min(end, length) - 1] = 1.0
        return Row(whole[:-1], whole[1:], mask)

    def _filled(self, row: Row, length: int) -> Row:
        """Return a row with padding up to `length` tokens."""
        count = length - len(row.tokens)
        tokens, labels = (
            np.pad(each, (0, count), constant_values=self._padding_id) for each in (row.tokens, row.labels)
        )
        return Row(tokens, labels, np.pad(row.loss_mask, (0, count)))

    def _part(self, which: NDArray[np.bool_], where: str) -> Samples | None:
        """Return some of the answers as samples of their own; None if there are none."""
        if not which.any():
            return None
        return Samples(self.arrays, self.seq_length, self._padding_id, where, self._entries[which])

    def _group(self, index: int) -> list[int]:
        """Return the numbers of the pairs or answers of a sample."""
        return [index] if self._packing is None else self._packing.row(index).tolist()

    def _answers_of(self, index: int) -> list[int]:
        return [each * self._width + number for each in self._group(index) for number in range(self._width)]

    def _rows(self, answers: list[int]) -> list[Row]:
        if self._packing is not None:
            return [joined_row(self.examples, answers)]
        return [self.examples.row(each) for each in answers]

    def _text_mask(self, rows: list[Row], answers: list[list[int]], counts: list[float]) -> torch.Tensor:
        mask = np.zeros((len(rows), self.seq_length), np.float32)
        row, count = 0, iter(counts)
        for sample in answers:
            at = 0
            for each in sample:
                length = self.examples.num_positions(each)
                mask[row, at : at + length] = next(count) * (self._entries[each] % 2 == 0)
                at, row = (at + length, row) if self._packing is not None else (0, row + 1)
            row += self._packing is not None
        return torch.from_numpy(mask)


FileSamples = Samples | PackedSamples | PreferenceSamples
"""Samples of data files."""


def fitting(arrays: TokenArrays, seq_length: int, *, together: bool) -> NDArray[np.bool_]:
    """Return for each example whether a row of `seq_length` tokens holds each of its answers, or both together."""
    fit: NDArray[np.bool_] = _needed(arrays, together=together) <= seq_length
    return fit


def _needed(arrays: TokenArrays, *, together: bool) -> NDArray[np.int64]:
    """Return the tokens of the row that each example needs."""
    return positions_needed(np.diff(arrays.offsets).reshape(-1, 2), together=together)


def _refuse_too_long(
    arrays: TokenArrays, seq_length: int, where: str, numbers: NDArray[np.int64], *, together: bool
) -> None:
    """Raise ConfigError if answers do not fit into a row."""
    too_long = np.unique(numbers[~fitting(arrays, seq_length, together=together)[numbers]])
    if not len(too_long):
        return
    lengths = np.diff(arrays.offsets).reshape(-1, 2)
    problems = [
        f"{arrays.place(2 * number)}: {answers_problem((int(lengths[number, 0]), int(lengths[number, 1])))}"
        for number in too_long[:NUM_PROBLEMS_SHOWN].tolist()
    ]
    more = [f"and {len(too_long) - NUM_PROBLEMS_SHOWN:,} more"] if len(too_long) > NUM_PROBLEMS_SHOWN else []
    needed = _needed(arrays, together=together)[numbers].max()
    what = (
        "both answers of a pair in one row, because of --pack" if together else "each answer with its prompt in a row"
    )
    raise ConfigError(
        f"{len(too_long):,} of {counted(len(np.unique(numbers)), 'example')} {'is' if len(too_long) == 1 else 'are'} "
        f"longer than --seq-length {seq_length:,}.",
        where=where,
        problems=[*problems, *more],
        expected=f"{what}; a part of an answer cannot be compared",
        next_command=f"--seq-length {needed}, or --skip-bad-examples to leave them out"
        + (", or without --pack" if together else ""),
    )


def _most_of(packing: Packing, positions: NDArray[np.int64], seq_length: int) -> PackedSizes:
    """Return the largest sizes of packed rows. positions: of each answer of each item, [items, answers]."""
    padding = seq_length - np.add.reduceat(positions.sum(axis=1)[packing.items], packing.offsets[:-1])
    num_answers = int(np.diff(packing.offsets).max()) * positions.shape[1]
    return PackedSizes(num_answers + 1, max(int(positions.max()), int(padding.max())))


def _previous_answers(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each answer of the cache the one before it: chosen ones first, then rejected ones, in a circle.

    Both answers of a pair are then with a prompt of another pair. -1 for what is empty.
    """
    order = np.arange(len(lengths)).reshape(-1, 2).T.reshape(-1)
    order = order[lengths[order] > 0]
    previous = np.full(len(lengths), -1, np.int64)
    previous[order] = np.roll(order, 1)
    return previous


def _first_learned(arrays: TokenArrays, entry: int) -> int:
    return int(arrays.spans[arrays.span_offsets[entry], 0])


def _joined(rows: Sequence[Row]) -> Row:
    return Row(
        np.concatenate([row.tokens for row in rows]),
        np.concatenate([row.labels for row in rows]),
        np.concatenate([row.loss_mask for row in rows]),
    )


def _values(values: NDArray[np.float64] | None, entries: NDArray[np.int64], counts: torch.Tensor) -> torch.Tensor:
    """Return the values of answers; 0 of those that do not count, whose values may not be known."""
    if values is None:
        return torch.zeros(len(entries), dtype=torch.float64)
    return torch.from_numpy(values[entries]).where(counts > 0, torch.zeros(()).double())


def _without_loss(row: Row) -> Row:
    return Row(row.tokens, row.labels, np.zeros_like(row.loss_mask), row.lengths)

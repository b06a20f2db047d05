"""Lengths of examples, and the decision of a run about each of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixtral_run.config.data import KTO, CheckConfig
from mixtral_run.train.data.check.length_advice import Advice, LengthRow, advise, histogram
from mixtral_run.train.data.length_limits import (
    answers_problem,
    positions_needed,
    response_problem,
    responses_within,
)
from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.templates.encoded import EncodedExample


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the examples.

    Attributes:
        num_tokens: of all examples.
        num_learned: tokens that count in the loss, whatever the length of a sample.
        num_truncated: examples longer than a sample.
        num_unlearned: examples of which nothing that is learned is within a sample.
        shortest, median, longest: of an example, in tokens.
        rows: the histogram.
        advice: the lengths that can be chosen.
        longest_row: the shortest --seq-length that the run would not refuse.
    """

    num_tokens: int
    num_learned: int
    num_truncated: int
    num_unlearned: int
    shortest: int
    median: int
    longest: int
    rows: tuple[LengthRow, ...]
    advice: Advice
    longest_row: int = 0


class LengthCount:
    """Lengths of the examples as they come: twelve bytes each. config: of the check.

    Attributes:
        lengths: tokens of each example; of preferences, of each answer with its prompt.
        highest_id: the highest token id.
    """

    def __init__(self, config: CheckConfig) -> None:
        self._seq_length, self._method = config.seq_length, config.method
        # Only pairs share a row.
        self._together = config.pack and config.method != KTO
        self.lengths, self._learned, self._starts = array("i"), array("i"), array("i")
        self._longest_row = 0
        self.highest_id = 0

    def add(self, example: Example, encoded: Sequence[EncodedExample]) -> str | None:
        """Count an example. Return the problem for which the run would refuse it, or None.

        encoded: tokens of the answers that the example has.
        """
        for each in encoded:
            self.lengths.append(len(each.tokens))
            self._learned.append(sum(end - begin for begin, end in each.learned))
            self._starts.append(each.learned[0][0] if each.learned else len(each.tokens))
            self.highest_id = max(self.highest_id, int(each.tokens.max(initial=0)))
        if self._method is None:
            return self._response_problem()
        return self._answers_problem(example, encoded)

    def _response_problem(self) -> str | None:
        length, start = self.lengths[-1], self._starts[-1]
        self._longest_row = max(self._longest_row, start)
        if responses_within(np.asarray([start], np.int64), self._seq_length).all():
            return None
        problem = response_problem(length, start)
        return f"longer than --seq-length {self._seq_length:,} before the response begins: {problem}"

    def _answers_problem(self, example: Example, encoded: Sequence[EncodedExample]) -> str | None:
        tokens = iter(encoded)
        first, second = (len(next(tokens).tokens) if each is not None else 0 for each in example.answers())
        needed = int(positions_needed(np.asarray([[first, second]], np.int64), together=self._together)[0])
        self._longest_row = max(self._longest_row, needed)
        if needed <= self._seq_length:
            return None
        both = ", which --pack needs for both answers" if self._together else ""
        return f"longer than --seq-length {self._seq_length:,}{both}: {answers_problem((first, second))}"

    def result(self) -> Lengths:
        """Return the figures. There must be an example."""
        lengths = np.frombuffer(self.lengths, np.int32)
        starts = np.frombuffer(self._starts, np.int32)
        # n tokens give n - 1 positions with a label.
        fits = self._seq_length + 1
        return Lengths(
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_learned=int(np.frombuffer(self._learned, np.int32).sum(dtype=np.int64)),
            num_truncated=int((lengths > fits).sum()),
            num_unlearned=int((starts >= fits).sum()),
            shortest=int(lengths.min()),
            median=int(np.median(lengths)),
            longest=int(lengths.max()),
            rows=histogram(lengths),
            advice=advise(lengths, starts, self._seq_length),
            longest_row=self._longest_row,
        )

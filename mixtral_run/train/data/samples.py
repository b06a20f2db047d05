"""Examples → samples → micro batches, in an order that does not depend on the layout. numpy and torch only.

The order is a function of the seed and of the number of consumed samples only: a run that is resumed with more
processes or another micro batch size sees the samples that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.cache.token_arrays import TokenArrays
from mixtral_run.train.data.length_limits import response_problem, responses_within
from mixtral_run.train.data.reading.examples import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_PROBLEMS_SHOWN = 10

# Separate streams, so that the shuffling and the mock tokens of one seed are independent.
_SHUFFLE_STREAM, _MOCK_STREAM = 0, 1


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass. All are [micro_batch, seq] on the CPU; labels are already shifted.

    `labels[b, i]` is the token after `tokens[b, i]`; `loss_mask[b, i]` is 1 if its loss counts.
    """

    tokens: torch.Tensor  # int64
    labels: torch.Tensor  # int64; any valid id if the mask is 0
    loss_mask: torch.Tensor  # float32, 0 or 1
    position_ids: torch.Tensor  # int64; starts at 0 in each sample of a packed row
    lengths: tuple[tuple[int, ...], ...] | None = None  # of each row's samples, if rows are packed
    answers: Answers | None = None  # if the samples are preferences


@dataclass(frozen=True)
class Answers:
    """The answers of a micro batch of preferences, [answers] each, in the order of the rows. On the CPU.

    Attributes:
        is_chosen: True for a chosen or a desirable answer. Of a pair the chosen one is first, the rejected one next.
        counts: float64, 0 for an answer that only fills a row, else 1.
        reference: float64, log-probability by the reference, summed over the answer; 0 without a reference.
        num_tokens: int64, of each answer.
        text_mask: float32 [rows, sequence], 1 where the label is in a chosen answer or in its prompt.
        spans: int64, positions of the row that each answer and each padding fills, if rows are packed; else None.
        answer_spans: int64, which of the spans are answers, if rows are packed.
        mismatched: each prompt with another answer; None unless the method needs them.
    """

    is_chosen: torch.Tensor
    counts: torch.Tensor
    reference: torch.Tensor
    num_tokens: torch.Tensor
    text_mask: torch.Tensor
    spans: torch.Tensor | None = None
    answer_spans: torch.Tensor | None = None
    mismatched: MicroBatch | None = None


@dataclass(frozen=True)
class GlobalBatch:
    """The data of one optimizer step. `micro_batches` are this rank's part; all counts are the same on every rank."""

    micro_batches: tuple[MicroBatch, ...]
    num_loss_tokens: int  # over all ranks: each rank divides its summed loss by it; of preferences: pairs or answers
    consumed_samples: int  # after this batch
    num_text_tokens: int = 0  # of preferences, over all ranks: labels of the chosen answers with their prompts


@dataclass(frozen=True)
class Row:
    """One sample, each array of length seq_length."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    lengths: tuple[int, ...] | None = None  # of the samples in a packed row, with padding as the last one


@dataclass(frozen=True)
class ExampleTokens:
    """An example without padding. place: in its file. learned: begin and end of each span that is learned."""

    place: str
    tokens: tuple[int, ...]
    learned: tuple[tuple[int, int], ...]


class OrderedSource(Protocol):
    """A source of samples in an order: a file or mock data."""

    @property
    def seq_length(self) -> int: ...

    def describe(self) -> str: ...

    def index_of(self, position: int, seed: int) -> int:
        """Return the sample at `position` of the endless order that `seed` defines."""
        ...

    def num_loss_tokens(self, index: int) -> int: ...


class SampleSource(OrderedSource, Protocol):
    """A source whose samples are a row each."""

    def row(self, index: int) -> Row: ...


@runtime_checkable
class AnswerSource(OrderedSource, Protocol):
    """A source whose samples are preferences: one or two rows each, or several samples a row."""

    def micro_batch(self, indices: Sequence[int | None]) -> MicroBatch:
        """Return the samples as a micro batch. None: the rows of any sample, of which nothing counts."""
        ...

    def num_text_tokens(self, index: int) -> int:
        """Return the number of labels in the chosen answers of a sample, with those in their prompts."""
        ...


AnySource = SampleSource | AnswerSource


class ShuffledOrder:
    """An endless order of `count` samples, shuffled anew each epoch."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._permutation: tuple[int, int, NDArray[np.int64]] | None = None

    def index_of(self, position: int, seed: int) -> int:
        epoch, place = divmod(position, self._count)
        if self._permutation is None or self._permutation[:2] != (seed, epoch):
            generator = np.random.default_rng((_SHUFFLE_STREAM, seed, epoch))
            self._permutation = (seed, epoch, generator.permutation(self._count))
        return int(self._permutation[2][place])


class Samples:
    """Examples as rows of `seq_length` tokens, padded or truncated; shuffled anew each epoch.

    n tokens give n − 1 positions with a label, so that an example of up to seq_length + 1 tokens fits.
    `num_padding_tokens` and `num_truncated` count what was padded and truncated; `highest_id` is the highest token id.

    Args:
        arrays: the encoded examples.
        seq_length: tokens of a row.
        padding_id: any valid id: padding is masked out of the loss, and follows every token that attention covers.
        where: the file, for errors.
        chosen: numbers of the examples to use, some perhaps several times; None: all, each once.

    Raises:
        ConfigError: examples are so long that nothing of their response is left; their lines are listed.
    """

    def __init__(
        self,
        arrays: TokenArrays,
        seq_length: int,
        padding_id: int,
        where: str | None = None,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._arrays, self._seq_length, self._padding_id = arrays, seq_length, padding_id
        self._chosen = chosen
        lengths = self._of_chosen(np.diff(arrays.offsets))
        if not len(lengths):
            raise ValueError("Samples needs at least one example")
        self._refuse_without_response(lengths, where)
        # Tokens of each row, with the label of its last position.
        self._lengths = np.minimum(lengths, seq_length + 1)
        self.num_loss_tokens_of_all = self._of_chosen(_learned_tokens(arrays, seq_length + 1))
        self.num_positions_of_all = self._lengths - 1
        self.num_tokens = int(self._lengths.sum())
        self.num_loss_tokens_total = int(self.num_loss_tokens_of_all.sum())
        self.num_padding_tokens = len(self) * seq_length - int(self.num_positions_of_all.sum())
        self.num_truncated = int((lengths > seq_length + 1).sum())
        self.longest = int(lengths.max())
        self.highest_id = arrays.highest_id
        self._order = ShuffledOrder(len(self))

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def seq_length(self) -> int:
        return self._seq_length

    def describe(self) -> str:
        """Return one line about the data for the start of a run."""
        capacity = len(self) * self._seq_length
        return (
            f"{len(self):,} examples, {self.num_tokens:,} tokens ({self.num_loss_tokens_total:,} count in the loss); "
            f"padding {self.num_padding_tokens:,} of {capacity:,} ({self.num_padding_tokens / capacity:.0%}); "
            f"truncated {self.num_truncated:,}; longest {self.longest:,} tokens, seq_length {self._seq_length:,}"
        )

    def index_of(self, position: int, seed: int) -> int:
        return self._order.index_of(position, seed)

    def num_positions(self, index: int) -> int:
        """Return the number of positions of a row that an example fills; the rest is padding."""
        return int(self.num_positions_of_all[index])

    def row(self, index: int) -> Row:
        length, number = int(self._lengths[index]), self._number(index)
        padded = np.full(self._seq_length + 1, self._padding_id, dtype=np.int64)
        padded[:length] = self._arrays.tokens_of(number, length)
        mask = np.zeros(self._seq_length, dtype=np.float32)
        first, last = self._arrays.span_offsets[number : number + 2].tolist()
        # Position i predicts token i + 1: the loss of a response starts at its prompt's last token. No position
        # predicts the first token.
        for begin, end in self._arrays.spans[first:last].tolist():
            mask[max(begin, 1) - 1 : min(end, length) - 1] = 1.0
        return Row(padded[:-1], padded[1:], mask)

    def example(self, index: int) -> ExampleTokens:
        """Return an example as far as a row holds it."""
        length, number = int(self._lengths[index]), self._number(index)
        first, last = self._arrays.span_offsets[number : number + 2].tolist()
        spans = self._arrays.spans[first:last].tolist()
        return ExampleTokens(
            self._arrays.place(number),
            tuple(self._arrays.tokens_of(number, length).tolist()),
            tuple((begin, min(end, length)) for begin, end in spans if begin < length),
        )

    def num_loss_tokens(self, index: int) -> int:
        return int(self.num_loss_tokens_of_all[index])

    def _number(self, index: int) -> int:
        return index if self._chosen is None else int(self._chosen[index])

    def _of_chosen(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return values if self._chosen is None else values[self._chosen]

    def _refuse_without_response(self, lengths: NDArray[np.int64], where: str | None) -> None:
        """Raise ConfigError if truncation leaves nothing to learn of some examples."""
        prompts = self._of_chosen(_first_learned(self._arrays))
        too_long = np.flatnonzero(~responses_within(prompts, self._seq_length))
        if len(too_long):
            problems = [
                f"{self._arrays.place(self._number(index))}: "
                + response_problem(int(lengths[index]), int(prompts[index]))
                for index in too_long[:NUM_PROBLEMS_SHOWN].tolist()
            ]
            more = [f"and {len(too_long) - NUM_PROBLEMS_SHOWN:,} more"] if len(too_long) > NUM_PROBLEMS_SHOWN else []
            raise ConfigError(
                f"{len(too_long):,} of {counted(len(lengths), 'example')} {'is' if len(too_long) == 1 else 'are'} "
                f"longer than --seq-length {self._seq_length:,} "
                f"before {'its' if len(too_long) == 1 else 'their'} response begins.",
                where=where,
                problems=[*problems, *more],
                next_command="a larger --seq-length, or shorter instructions",
            )


def has_response(arrays: TokenArrays, seq_length: int) -> NDArray[np.bool_]:
    """Return for each example whether something of it is learned in a row of `seq_length` tokens."""
    return responses_within(_first_learned(arrays), seq_length)


def _first_learned(arrays: TokenArrays) -> NDArray[np.int64]:
    """Return the first learned token of each example, the number of its tokens if none is learned."""
    has_one = np.diff(arrays.span_offsets) > 0
    first = np.diff(arrays.offsets)
    first[has_one] = arrays.spans[arrays.span_offsets[:-1][has_one], 0]
    return first


def _learned_tokens(arrays: TokenArrays, longest: int) -> NDArray[np.int64]:
    """Return how many of the first `longest` tokens of each example are learned; the very first one never is."""
    in_each = np.diff(np.clip(arrays.spans, 1, longest), axis=1)[:, 0]
    # Differences of running sums: spans of one example are next to each other.
    sums = np.concatenate([[0], np.cumsum(in_each, dtype=np.int64)])
    counts: NDArray[np.int64] = sums[arrays.span_offsets[1:]] - sums[arrays.span_offsets[:-1]]
    return counts


class MockSamples:
    """Endless random samples, each a function of the seed and its number, the same in every layout."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int) -> None:
        self._vocab_size, self._seq_length, self._seed = vocab_size, seq_length, seed

    @property
    def seq_length(self) -> int:
        return self._seq_length

    def describe(self) -> str:
        return f"mock data: random tokens below {self._vocab_size:,}, seq_length {self._seq_length:,}"

    def index_of(self, position: int, seed: int) -> int:  # noqa: ARG002 - already random
        return position

    def row(self, index: int) -> Row:
        generator = np.random.default_rng((_MOCK_STREAM, self._seed, index))
        tokens = generator.integers(0, self._vocab_size, self._seq_length + 1, dtype=np.int64)
        return Row(tokens[:-1], tokens[1:], np.ones(self._seq_length, dtype=np.float32))

    def num_loss_tokens(self, index: int) -> int:  # noqa: ARG002 - the same for all
        return self._seq_length


def batch_size_problems(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> list[str]:
    """Return the problem of a global batch that cannot be split evenly over ranks, or an empty list."""
    step = micro_batch_size * data_parallel_size
    if global_batch_size % step == 0:
        return []
    return [
        f"--global-batch-size: expected a multiple of {step} (--micro-batch-size {micro_batch_size} × "
        f"{data_parallel_size} data-parallel processes); found {global_batch_size}"
    ]


def batches(
    source: AnySource,
    *,
    seed: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    consumed_samples: int = 0,
) -> Iterator[GlobalBatch]:
    """Yield this rank's part of each global batch without end, starting after `consumed_samples`.

    Rank r of n takes the r-th n-th of every global batch, `micro_batch_size` samples at a time. No communication: every
    rank computes the same order. Raises ConfigError if the batch cannot be split evenly.
    """
    problems = batch_size_problems(global_batch_size, micro_batch_size, data_parallel_size)
    if problems:
        raise ConfigError("The batch cannot be split over the ranks.", problems=problems)
    return _batches(
        source, seed, micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size, consumed_samples
    )


def _batches(
    source: AnySource, seed: int, micro: int, global_: int, rank: int, num_ranks: int, consumed: int
) -> Iterator[GlobalBatch]:
    part = global_ // num_ranks
    while True:
        chosen = [source.index_of(position, seed) for position in range(consumed, consumed + global_)]
        mine = chosen[rank * part : (rank + 1) * part]
        consumed += global_
        yield GlobalBatch(
            tuple(micro_batch(source, mine[i : i + micro]) for i in range(0, part, micro)),
            sum(source.num_loss_tokens(index) for index in chosen),
            consumed,
            sum(map(source.num_text_tokens, chosen)) if isinstance(source, AnswerSource) else 0,
        )


def micro_batch(source: AnySource, indices: Sequence[int | None]) -> MicroBatch:
    """Return samples as a micro batch. Missing ones become rows without loss: all ranks run the experts together."""
    if isinstance(source, AnswerSource):
        return source.micro_batch(indices)
    found = []
    for index in indices:
        row = source.row(index or 0)
        found.append(row if index is not None else replace(row, loss_mask=np.zeros_like(row.loss_mask)))
    return stacked(found)


def stacked(rows: Sequence[Row]) -> MicroBatch:
    """Stack rows of one length into a micro batch."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    whole = tuple(row.lengths or (len(row.tokens),) for row in rows)
    return MicroBatch(
        tokens,
        torch.from_numpy(np.stack([row.labels for row in rows])),
        torch.from_numpy(np.stack([row.loss_mask for row in rows])),
        torch.stack([torch.cat([torch.arange(length) for length in row]) for row in whole]),
        whole if any(row.lengths for row in rows) else None,
    )

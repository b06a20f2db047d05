"""Examples → samples → micro batches, in an order that does not depend on the layout. numpy and torch only.

The order is a function of the seed and of the number of consumed samples only: a run that is resumed with more
processes or another micro batch size sees the samples that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.example import Example
from mixtral_run.train.data.examples import first_problems
from mixtral_run.train.data.instruct_encoding import encode

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class GlobalBatch:
    """The data of one optimizer step. `micro_batches` are this rank's part; both counts are the same on every rank."""

    micro_batches: tuple[MicroBatch, ...]
    num_loss_tokens: int  # over all ranks: each rank divides its summed loss by it
    consumed_samples: int  # after this batch


@dataclass(frozen=True)
class Row:
    """One sample, each array of length seq_length."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    lengths: tuple[int, ...] | None = None  # of the samples in a packed row, with padding as the last one


class SampleSource(Protocol):
    """A source of samples: a file or mock data."""

    @property
    def seq_length(self) -> int: ...

    def describe(self) -> str: ...

    def index_of(self, position: int, seed: int) -> int:
        """Return the sample at `position` of the endless order that `seed` defines."""
        ...

    def row(self, index: int) -> Row: ...

    def num_loss_tokens(self, index: int) -> int: ...


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
    """All examples as tokens, padded or truncated to `seq_length`; shuffled anew each epoch.

    n tokens give n − 1 positions with a label, so that an example of up to seq_length + 1 tokens fits.
    `num_padding_tokens` and `num_truncated` count what was padded and truncated; `highest_id` is the highest token id.

    Args:
        examples: at least one.
        tokenizer: encodes them (prompt.py).
        seq_length: tokens of a row.
        where: the file, for errors.

    Raises:
        ConfigError: examples are so long that nothing of their response is left; their lines are listed.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_length: int, where: str | None = None
    ) -> None:
        if not examples:
            raise ValueError("Samples needs at least one example")
        self._seq_length = seq_length
        # The tokens, and begin and end of each response among them.
        self._rows: list[tuple[NDArray[np.int64], list[tuple[int, int]]]] = []
        self.num_tokens = 0
        self.num_loss_tokens_total = 0
        self.num_padding_tokens = 0
        self.num_truncated = 0
        self.longest = 0
        self.highest_id = 0
        # Any valid id will do: padding is masked out of the loss, and follows every token that causal attention covers.
        self._padding_id = int(tokenizer.eos_token_id)
        self._encode(examples, tokenizer, where)
        self._order = ShuffledOrder(len(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

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
        return len(self._rows[index][0]) - 1

    def row(self, index: int) -> Row:
        tokens, responses = self._rows[index]
        length = self._seq_length
        padded = np.full(length + 1, self._padding_id, dtype=np.int64)
        padded[: len(tokens)] = tokens
        mask = np.zeros(length, dtype=np.float32)
        # Position i predicts token i + 1: the loss of a response starts at its prompt's last token.
        for begin, end in responses:
            mask[begin - 1 : end - 1] = 1.0
        return Row(padded[:-1], padded[1:], mask)

    def num_loss_tokens(self, index: int) -> int:
        return sum(end - begin for begin, end in self._rows[index][1])

    def _encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, where: str | None) -> None:
        problems = []
        for example in examples:
            encoded = encode(tokenizer, example)
            row, responses = encoded.tokens, list(encoded.learned)
            length, num_prompt = len(row), responses[0][0]
            if num_prompt > self._seq_length:
                problems.append(
                    f"{example.place}: {length:,} tokens, {num_prompt:,} of them in the instruction; "
                    "nothing of the response is left"
                )
                continue
            tokens = np.asarray(row[: self._seq_length + 1], dtype=np.int64)
            responses = [(begin, min(end, len(tokens))) for begin, end in responses if begin < len(tokens)]
            self._rows.append((tokens, responses))
            self.num_truncated += length > len(tokens)
            self.num_tokens += len(tokens)
            self.num_loss_tokens_total += sum(end - begin for begin, end in responses)
            self.num_padding_tokens += self._seq_length - (len(tokens) - 1)
            self.longest = max(self.longest, length)
            self.highest_id = max(self.highest_id, int(tokens.max()))
        if problems:
            raise ConfigError(
                f"{len(problems):,} of {len(examples):,} examples are longer than --seq-length {self._seq_length:,} "
                "before their response begins.",
                where=where,
                problems=first_problems(problems),
                next_command="a larger --seq-length, or shorter instructions",
            )


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
    source: SampleSource,
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
    source: SampleSource, seed: int, micro: int, global_: int, rank: int, num_ranks: int, consumed: int
) -> Iterator[GlobalBatch]:
    part = global_ // num_ranks
    while True:
        chosen = [source.index_of(position, seed) for position in range(consumed, consumed + global_)]
        mine = chosen[rank * part : (rank + 1) * part]
        consumed += global_
        yield GlobalBatch(
            tuple(stacked([source.row(index) for index in mine[i : i + micro]]) for i in range(0, part, micro)),
            sum(source.num_loss_tokens(index) for index in chosen),
            consumed,
        )


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

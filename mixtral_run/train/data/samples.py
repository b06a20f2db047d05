"""Pairs → samples → micro batches, in one order whatever the layout. numpy and torch only.

The order is a function of the seed and of how many samples were consumed, nothing else: a run that is resumed, or that
goes on with more processes or another micro batch size, sees the samples it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.examples import Example, first_problems
from mixtral_run.train.data.prompt import encode_conversation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Kept apart, so that the shuffling and the mock tokens of one seed do not come from the same numbers.
_SHUFFLE_STREAM, _MOCK_STREAM = 0, 1


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes. All are [micro_batch, seq] on the CPU; labels are already shifted.

    `labels[b, i]` is the token after `tokens[b, i]`, and `loss_mask[b, i]` says whether guessing it counts.
    """

    tokens: torch.Tensor  # int64
    labels: torch.Tensor  # int64; where the mask is 0, any valid id
    loss_mask: torch.Tensor  # float32, 0 or 1
    position_ids: torch.Tensor  # int64; anew in each sample of a packed row
    lengths: tuple[tuple[int, ...], ...] | None = None  # of each row's samples, where rows are packed


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step. `micro_batches` are this rank's share; the two numbers are the same on every rank."""

    micro_batches: tuple[MicroBatch, ...]
    num_loss_tokens: int  # over all ranks: dividing each rank's summed loss by it gives the mean over the batch
    consumed_samples: int  # after this batch: where to go on


@dataclass(frozen=True)
class Row:
    """One sample, each array of length seq_length."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    lengths: tuple[int, ...] | None = None  # of the samples in a packed row; padding is one


class SampleSource(Protocol):
    """Where samples come from."""

    @property
    def seq_length(self) -> int: ...

    def describe(self) -> str: ...

    def index_of(self, position: int, seed: int) -> int:
        """Which sample stands at `position` of the endless order that `seed` gives."""
        ...

    def row(self, index: int) -> Row: ...

    def num_loss_tokens(self, index: int) -> int: ...


class ShuffledOrder:
    """An endless order of `count` things, shuffled anew each epoch."""

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
    """All pairs as tokens, padded or truncated to `seq_length`; shuffled anew each epoch.

    A row of n tokens gives n − 1 places, so a pair of up to seq_length + 1 tokens fits whole. What was padded and cut
    is counted in `num_padding_tokens` and `num_truncated`. where: what errors call their file. Raises ConfigError, with
    their lines, when pairs are so long that nothing of their response is left to learn.
    """

    def __init__(
        self, pairs: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_length: int, where: str | None = None
    ) -> None:
        if not pairs:
            raise ValueError("Samples needs at least one pair")
        self._seq_length = seq_length
        # The tokens, and where among them responses begin and end.
        self._rows: list[tuple[NDArray[np.int64], list[tuple[int, int]]]] = []
        self.num_tokens = 0
        self.num_loss_tokens_total = 0
        self.num_padding_tokens = 0
        self.num_truncated = 0
        self.longest = 0
        # Padding is masked out of the loss and lies behind everything that could attend to it: any valid id will do.
        self._padding_id = int(tokenizer.eos_token_id)
        self._encode(pairs, tokenizer, where)
        self._order = ShuffledOrder(len(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def seq_length(self) -> int:
        return self._seq_length

    def describe(self) -> str:
        """One line for the start of a run."""
        places = len(self) * self._seq_length
        return (
            f"{len(self):,} pairs, {self.num_tokens:,} tokens ({self.num_loss_tokens_total:,} count in the loss); "
            f"padding {self.num_padding_tokens:,} of {places:,} ({self.num_padding_tokens / places:.0%}); "
            f"truncated {self.num_truncated:,}; longest {self.longest:,} tokens, seq_length {self._seq_length:,}"
        )

    def index_of(self, position: int, seed: int) -> int:
        return self._order.index_of(position, seed)

    def num_places(self, index: int) -> int:
        """Places of a row that a pair fills; the rest is padding."""
        return len(self._rows[index][0]) - 1

    def row(self, index: int) -> Row:
        tokens, responses = self._rows[index]
        length = self._seq_length
        padded = np.full(length + 1, self._padding_id, dtype=np.int64)
        padded[: len(tokens)] = tokens
        mask = np.zeros(length, dtype=np.float32)
        # Place i is asked for token i + 1: a response begins to count at its prompt's last token.
        for begin, end in responses:
            mask[begin - 1 : end - 1] = 1.0
        return Row(padded[:-1], padded[1:], mask)

    def num_loss_tokens(self, index: int) -> int:
        return sum(end - begin for begin, end in self._rows[index][1])

    def _encode(self, pairs: Sequence[Example], tokenizer: PreTrainedTokenizerBase, where: str | None) -> None:
        problems = []
        for pair in pairs:
            row, responses = _row_of(encode_conversation(tokenizer, pair.turns))
            length, num_prompt = len(row), responses[0][0]
            if num_prompt > self._seq_length:
                problems.append(
                    f"line {pair.line}: {length:,} tokens, of which the instruction takes {num_prompt:,}; "
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
        if problems:
            raise ConfigError(
                f"{len(problems):,} of {len(pairs):,} pairs are longer than --seq-length {self._seq_length:,} before "
                "their response begins.",
                where=where,
                problems=first_problems(problems),
                next_command="a larger --seq-length, or shorter instructions",
            )


def _row_of(turns: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[tuple[int, int]]]:
    """A conversation's tokens, and where among them its responses begin and end."""
    row: list[int] = []
    responses = []
    for prompt, answer in turns:
        begin = len(row) + len(prompt)
        row += prompt + answer
        responses.append((begin, len(row)))
    return row, responses


class MockSamples:
    """Endless random tokens, each a function of the seed and its number: the same in every layout. All count."""

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
    """What keeps a global batch from being shared out evenly; empty when nothing does."""
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
    """Yield global batches without end, from the sample after `consumed_samples` on; this rank's share of each.

    Rank r of n takes the r-th n-th of every global batch, in runs of `micro_batch_size`. No communication: every rank
    works out the same order. Raises ConfigError when the batch cannot be shared out evenly.
    """
    problems = batch_size_problems(global_batch_size, micro_batch_size, data_parallel_size)
    if problems:
        raise ConfigError("The batch cannot be shared out.", problems=problems)
    return _batches(
        source, seed, micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size, consumed_samples
    )


def _batches(
    source: SampleSource, seed: int, micro: int, global_: int, rank: int, num_ranks: int, consumed: int
) -> Iterator[GlobalBatch]:
    share = global_ // num_ranks
    while True:
        chosen = [source.index_of(position, seed) for position in range(consumed, consumed + global_)]
        mine = chosen[rank * share : (rank + 1) * share]
        consumed += global_
        yield GlobalBatch(
            tuple(stacked([source.row(index) for index in mine[i : i + micro]]) for i in range(0, share, micro)),
            sum(source.num_loss_tokens(index) for index in chosen),
            consumed,
        )


def stacked(rows: Sequence[Row]) -> MicroBatch:
    """Rows of one length as a micro batch."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    whole = tuple(row.lengths or (len(row.tokens),) for row in rows)
    return MicroBatch(
        tokens,
        torch.from_numpy(np.stack([row.labels for row in rows])),
        torch.from_numpy(np.stack([row.loss_mask for row in rows])),
        torch.stack([torch.cat([torch.arange(length) for length in row]) for row in whole]),
        whole if any(row.lengths for row in rows) else None,
    )

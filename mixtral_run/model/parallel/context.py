"""Context parallelism: the part of each row that a rank computes.

A row of n tokens is cut into 2 · CP chunks, and rank i gets chunks i and 2 · CP − 1 − i. Attention is causal, so that
late chunks take longer than early ones; this way all ranks have the same amount of work (Llama 3, arXiv:2407.21783,
section 3.3.2). Everything but attention computes each token by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.parallel.megatron import gather_from_sequence_parallel_region


@dataclass(frozen=True)
class ContextPart:
    """The chunks of one rank. group: the process group of the ranks that share a row; None only without collectives."""

    rank: int
    size: int
    group: Any = None

    def chunk(self, length: int) -> int:
        """Return the tokens of a chunk of a row of `length` tokens. Raises ValueError if the row cannot be cut."""
        if length % (2 * self.size):
            raise ValueError(f"a row of {length} tokens cannot be cut into {2 * self.size} chunks")
        return length // (2 * self.size)

    def starts(self, length: int) -> tuple[int, int]:
        """Return the first tokens of the rank's two chunks in a row of `length` tokens, in ascending order."""
        chunk = self.chunk(length)
        return self.rank * chunk, (2 * self.size - 1 - self.rank) * chunk

    def places(self, length: int, device: torch.device) -> Tensor:
        """Return the positions in the row of the rank's tokens, int64 [length / CP]. Copies nothing from the host."""
        chunk = self.chunk(length)
        return torch.cat([torch.arange(start, start + chunk, device=device) for start in self.starts(length)])

    def of_row(self, values: Tensor) -> Tensor:
        """Return the rank's tokens of values [batch, sequence]: [batch, sequence / CP]."""
        return values.index_select(1, self.places(values.shape[1], values.device))

    def into_row(self, values: Tensor) -> Tensor:
        """Return values [batch, sequence / CP] at their places in rows [batch, sequence], which are 0 elsewhere."""
        length = values.shape[1] * self.size
        rows = values.new_zeros(values.shape[0], length)
        return rows.index_copy(1, self.places(length, values.device), values)

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of which values [sequence / CP, …] are this rank's part: [sequence, …], in the row's order.

        The gradients of all ranks are summed where the values came from. All ranks of the group must call.
        """
        gathered = gather_from_sequence_parallel_region(values, group=self.group)
        return in_row_order(gathered, self.size)


def in_row_order(gathered: Tensor, size: int) -> Tensor:
    """Return the parts of all ranks, concatenated by rank [sequence, …], in the order of the row."""
    chunks = gathered.unflatten(0, (size, 2, -1))
    # The first chunks ascend with the rank, the second ones descend.
    return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1)

"""Several samples in one row: attention within each, and none from one to the next.

On a GPU torch's variable-length attention, which visits only the blocks inside samples; elsewhere, and as the tests'
reference, a mask of diagonal blocks over the whole row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

BLOCK = 128
"""Queries that attention's kernel takes at once."""
MOST_VISITS = 32
"""To how many times a row's blocks attention may be led by samples that are shorter than the longest, or not there, and
shapes that stay still pay. Each is left at once, some 12 µs a layer's 128 tokens and pass, of some 14 ms; counted."""


@dataclass(frozen=True)
class PackedSizes:
    """What is the most in any row of a run. samples: of a row, its padding as one of them; longest: tokens of one."""

    samples: int
    longest: int

    def pay(self, seq_length: int) -> bool:
        """Whether rows of so many tokens with these sizes, each with all samples, take little longer than their own."""
        return self.samples * -(-self.longest // BLOCK) <= MOST_VISITS * -(-seq_length // BLOCK)


@dataclass(frozen=True)
class Packed:
    """Where the samples of a micro batch lie. boundaries: int32 [samples + 1], in tokens of all rows one after the
    other; owner: int32 [batch, sequence], the number of each token's sample; longest: of no sample are more tokens."""

    boundaries: Tensor
    owner: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], device: torch.device, most: PackedSizes | None = None) -> Self:
        """lengths: of each row's samples, padding as one of them; every row's add up to the same.

        most: where given, samples of no tokens come behind the others, so that of all micro batches shapes are alike.
        """
        flat = torch.tensor([length for row in lengths for length in row], dtype=torch.int32)
        longest = int(flat.max())
        if most is not None:
            missing = len(lengths) * most.samples - len(flat)
            if missing < 0 or longest > most.longest:
                raise ValueError(f"{len(flat)} samples in {len(lengths)} rows, of up to {longest} tokens: over {most}")
            flat, longest = torch.nn.functional.pad(flat, (0, missing)), most.longest
        boundaries = torch.nn.functional.pad(flat.cumsum(0, dtype=torch.int32), (1, 0))
        owner = torch.arange(len(flat), dtype=torch.int32).repeat_interleave(flat).view(len(lengths), -1)
        return cls(boundaries.to(device), owner.to(device), longest)

    def mask(self) -> Tensor:
        """bool [batch, 1, queries, keys], True where a token may look: back, within its sample."""
        same = self.owner[:, None, :, None] == self.owner[:, None, None, :]
        allowed: Tensor = same.tril()
        return allowed


def has_packed_attention(query: Tensor) -> bool:
    """Whether torch's variable-length kernel runs here: bf16 or fp16 on a GPU of compute capability 8.0 or more."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """Causal attention within samples, scaled by 1 / √(head size), on a GPU.

    query: [batch, heads, sequence, head size], key and value with fewer heads where they are shared; as query.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, _, sequence, _ = query.shape
    bounds, longest = packed.boundaries, packed.longest
    attend: Any = varlen_attn
    output: Tensor = attend(
        *(each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)),
        *(bounds, bounds, longest, longest),
        **_causal(query.shape[1] != key.shape[1]),
    )
    result: Tensor = output.unflatten(0, (batch, sequence)).transpose(1, 2)
    return result


@functools.cache
def _causal(shared_keys: bool) -> dict[str, Any]:
    """The words for causal attention, by torch's version: is_causal in 2.10, a window since; shared keys need saying
    since 2.12, before the kernel saw it from the shapes."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    words: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        words["enable_gqa"] = shared_keys
    return words

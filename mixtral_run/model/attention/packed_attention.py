"""Attention for rows that hold several samples: tokens attend within their sample only.

On a GPU this is torch's variable-length attention, which visits only the blocks inside samples. Elsewhere, and as the
reference of the tests, it is a mask of diagonal blocks over the whole row.
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
"""Queries of a block of the attention kernel."""
MOST_VISITS = 32
"""Most blocks that attention may visit, over those of a row, for constant shapes to pay. Constant shapes add blocks for
samples that are shorter than the longest, or missing; each returns at once, but takes some 12 µs a layer and pass for
every 128 tokens, of some 14 ms."""


@dataclass(frozen=True)
class PackedSizes:
    """Maxima over the rows of a run. samples: of a row, counting its padding as one; longest: tokens of a sample."""

    samples: int
    longest: int

    def pay(self, seq_length: int) -> bool:
        """Return True if rows of seq_length tokens padded to these sizes take little longer than their own samples."""
        return self.samples * -(-self.longest // BLOCK) <= MOST_VISITS * -(-seq_length // BLOCK)


@dataclass(frozen=True)
class Packed:
    """Boundaries of the samples of a micro batch.

    boundaries: int32 [samples + 1], offsets into the tokens of all rows concatenated. owner: int32 [batch, sequence],
    the number of each token's sample. longest: upper bound of the tokens of a sample.
    """

    boundaries: Tensor
    owner: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], device: torch.device, most: PackedSizes | None = None) -> Self:
        """Return the boundaries for the lengths of each row's samples, padding included; all rows have the same sum.

        most: if given, empty samples are appended up to this number, so that all micro batches have the same shapes.
        Raises ValueError if the lengths exceed `most`.
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
        """Return bool [batch, 1, queries, keys], True where a token may attend: to itself and earlier tokens of its
        sample.
        """
        same = self.owner[:, None, :, None] == self.owner[:, None, None, :]
        allowed: Tensor = same.tril()
        return allowed


def has_packed_attention(query: Tensor) -> bool:
    """Return True if torch's variable-length kernel runs: bf16 or fp16 on a GPU of compute capability 8.0 or more."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """Return causal attention within samples, scaled by 1 / √(head size), on a GPU: the shape of query.

    query: [batch, heads, sequence, head size]. key, value: the same, or fewer heads that queries share.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, _, sequence, _ = query.shape
    bounds, longest = packed.boundaries, packed.longest
    attend: Any = varlen_attn
    output: Tensor = attend(
        *(each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)),
        *(bounds, bounds, longest, longest),
        **causal_arguments(query.shape[1] != key.shape[1]),
    )
    result: Tensor = output.unflatten(0, (batch, sequence)).transpose(1, 2)
    return result


@functools.cache
def causal_arguments(shared_keys: bool) -> dict[str, Any]:
    """Return the arguments of causal attention for this version of torch. shared_keys: True if queries share keys.

    torch 2.10 has is_causal, later versions a window. Since 2.12 shared keys need enable_gqa; before, the kernel
    derived it from the shapes.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    words: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        words["enable_gqa"] = shared_keys
    return words

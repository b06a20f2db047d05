"""Attention under context parallelism: the queries of a rank's chunks over the keys of the whole row.

Every rank gathers the keys and values of the row. Mixtral's queries share keys: a token's keys and values have a
quarter of the size of its queries, 4 KiB in bf16 over all heads. The softmax of a query is computed once over all of
its keys, as without context parallelism, and no partial results need to be merged.

On a GPU a chunk is one call of torch's variable-length attention, whose causal mask is aligned with the last key: the
queries of a chunk that belong to a sample attend to the keys from the sample's first token on. A row without packing
is one sample. Elsewhere, and as the reference of the tests, it is a mask over the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mixtral_run.model.attention.packed_attention import Packed, causal_arguments
from mixtral_run.model.parallel.context import ContextPart


@dataclass(frozen=True)
class ChunkBounds:
    """Boundaries of the samples in one chunk of each row.

    queries, keys: int32 [samples + 1], offsets into the chunk's queries, and into the keys up to the chunk's end, of
    all rows concatenated. num_keys: keys of a row up to the chunk's end. longest: upper bounds of the queries and of
    the keys of a sample.
    """

    queries: Tensor
    keys: Tensor
    num_keys: int
    longest: tuple[int, int]

    @classmethod
    def of(cls, packed: Packed, length: int, start: int, chunk: int) -> Self:
        """Return the boundaries of the chunk of rows of `length` tokens that begins at `start`.

        A sample that ends before the chunk has no queries, one that begins after it has neither queries nor keys.
        """
        row = torch.div(packed.boundaries, length, rounding_mode="floor")
        within, num_keys = packed.boundaries - row * length, start + chunk
        queries = row * chunk + (within - start).clamp(0, chunk)
        keys = row * num_keys + within.clamp(max=num_keys)
        return cls(queries.int(), keys.int(), num_keys, (min(chunk, packed.longest), min(num_keys, packed.longest)))


@dataclass(frozen=True)
class ContextInputs:
    """What the attention of all layers shares in one pass.

    mask: bool [batch or 1, 1, queries of this rank, keys of the row], without `bounds`. bounds: of both chunks, on GPUs
    with variable-length attention.
    """

    part: ContextPart
    mask: Tensor | None
    bounds: tuple[ChunkBounds, ChunkBounds] | None

    @classmethod
    def of(
        cls, part: ContextPart, length: int, packed: Packed | None, batch: int, *, masked: bool, device: Any
    ) -> Self:
        """Return the inputs for rows of `length` tokens. masked: for attention by a mask."""
        if masked:
            return cls(part, _mask(part, length, packed, device), None)
        if packed is None:
            rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
            packed = Packed(rows * length, rows[:-1, None].expand(batch, length), length)
        first, second = (ChunkBounds.of(packed, length, start, part.chunk(length)) for start in part.starts(length))
        return cls(part, None, (first, second))


def _mask(part: ContextPart, length: int, packed: Packed | None, device: Any) -> Tensor:
    places = part.places(length, device)
    allowed = (places[:, None] >= torch.arange(length, device=device))[None]
    if packed is not None:
        allowed = allowed & (part.of_row(packed.owner)[:, :, None] == packed.owner[:, None, :])
    return allowed[:, None]


def attention_of_chunks(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[ChunkBounds, ChunkBounds]) -> Tensor:
    """Return causal attention within samples, scaled by 1 / √(head size), on a GPU: the shape of query.

    query: [batch, heads, queries, head size], of both chunks. key, value: [batch, groups, keys of the row, head size].
    """
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    batch, heads, _, _ = query.shape
    results = []
    for part, each in zip(query.chunk(2, dim=2), bounds, strict=True):
        chunk = part.shape[2]
        parts = part, key[:, :, : each.num_keys], value[:, :, : each.num_keys]
        output: Tensor = attend(
            *(tensor.transpose(1, 2).flatten(0, 1) for tensor in parts),
            *(each.queries, each.keys, *each.longest),
            **causal_arguments(heads != key.shape[1]),
        )
        results.append(output.unflatten(0, (batch, chunk)))
    # Joined with positions first, as the output projection takes them: of one row that is no further copy.
    return torch.cat(results, dim=1).transpose(1, 2)

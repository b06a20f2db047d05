"""The tokens that prompts begin with, computed once: a system prompt, or the conversation so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixtral_run.inference.decode import Decoding, Prefix
from mixtral_run.model.attention.attention import KeyValueCache
from mixtral_run.model.mixtral import MixtralModel

LEAST_SAVED_TOKENS = 512
"""A pass over a prefix must save so many tokens of later passes.

It reads the weights once more: on an H200 about 93 GB in 19 ms, in which 450 tokens could be computed, of 26 GFLOP each
at 600 TFLOP/s.
"""


class PrefixMemory:
    """Keys and values of one row of tokens, for later prompts that begin with the same ones.

    It belongs to one model with one adapter: `forget` when either changes. All ranks must make the same calls.
    """

    def __init__(self) -> None:
        self._kept = Prefix((), KeyValueCache(0))

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept = Prefix((), KeyValueCache(0))

    def of(self, model: MixtralModel, rows: Sequence[Sequence[int]]) -> Prefix | None:
        """Return a prefix of all rows with its keys and values, None for none. At least one token of each row remains.

        What several rows share and is not kept is computed, if that saves enough. What is kept of a single row is
        handed over with its memory, so that there is one copy of it.
        """
        shared = common(rows)
        shared = shared[: min(len(shared), min(map(len, rows)) - 1)]
        known = len(common([shared, self._kept.tokens]))
        if (len(rows) - 1) * (len(shared) - known) >= LEAST_SAVED_TOKENS:
            device = model.mesh.device
            passes = Decoding(model, torch.zeros(1, dtype=torch.int64, device=device), len(shared), self._first(known))
            passes(torch.tensor([shared[known:]], device=device))
            self._kept = Prefix(shared, passes.cache)
            known = len(shared)
        prefix = self._first(known)
        if len(rows) == 1:
            # It becomes the row's own cache, and `keep` takes it back.
            self.forget()
        return prefix

    def keep(self, tokens: Sequence[int], cache: KeyValueCache) -> None:
        """Keep a row with the cache that its passes filled. tokens: may go on after what the cache holds."""
        self._kept = Prefix(tuple(tokens[: cache.length]), cache)

    def _first(self, count: int) -> Prefix | None:
        return Prefix(self._kept.tokens[:count], self._kept.cache) if count else None


def common(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the tokens that all rows begin with."""
    ordered = sorted(map(tuple, rows))
    low, high = ordered[0], ordered[-1]  # what the first and the last in order share, all between them have
    length = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:length]

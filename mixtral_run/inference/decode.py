"""Passes of generation: over the prompts, then over one more token of each sequence, with cached keys and values.

A pass over one token launches as many kernels as a pass over thousands, so that the GPU waits for the host. With fixed
shapes it is captured as a CUDA graph once and replayed, collectives included, as in training
(train/steps/cuda_graph.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mixtral_run.model.attention.attention import KeyValueCache
from mixtral_run.model.dispatch.all_gather import AllGatherDispatcher
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import refused
from mixtral_run.planner import policy

log = logging.getLogger(__name__)

CAPTURE_TOLERANCE = 2e-2
"""Largest accepted difference of the graph's logits from the eager pass, relative to the largest logit: bf16 sums."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that all rows begin with. cache: their keys and values, of one row; it may hold more tokens after them."""

    tokens: tuple[int, ...]
    cache: KeyValueCache


class Decoding:
    """Eager passes, one after the other. All ranks must construct one and make the same calls.

    Args:
        model: in evaluation mode.
        padding: int64 [rows], the number of padding tokens on the left of each row, after the prefix.
        max_length: tokens of a row, with the prefix and all that will be generated.
        prefix: not passed again; the first call has the tokens after it.
    """

    def __init__(self, model: MixtralModel, padding: Tensor, max_length: int, prefix: Prefix | None = None) -> None:
        self._model, self._padding = model, padding
        self._ragged = bool(padding.any())
        self._begin = len(prefix.tokens) if prefix is not None else 0
        self.cache = (
            prefix.cache.repeated(len(padding), self._begin, max_length)
            if prefix is not None
            else KeyValueCache(max_length)
        )
        mesh, count = model.mesh, model.architecture.num_experts
        self._all_gather = (
            AllGatherDispatcher(mesh.expert_group, count, padding.device, unlimited=True)
            if mesh.expert_size > 1
            else None
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the last position's logits [rows, vocabulary].

        tokens: int64 [rows, length], the prompts in the first call, the tokens that follow in later ones.
        """
        begin = self.cache.length
        positions = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)
        # Without a mask, several tokens after cached ones would not see them as earlier ones.
        masked = self._ragged or (begin > 0 and len(positions) > 1)
        return self._pass(tokens, positions, self._mask(positions) if masked else None)

    def end(self) -> None:
        """Free what the passes hold. Call it after the last pass, but not after an error."""

    def _pass(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        model = self._model
        dispatch = policy.decoding_dispatch(tokens.numel(), model.mesh.expert_size)
        logits = model.logits(
            tokens,
            # Padding takes no position.
            positions=(positions[None] - self._padding[:, None]).clamp(min=self._begin),
            mask=mask,
            cache=self.cache,
            last_only=True,
            dispatcher=self._all_gather if dispatch.has_fixed_shapes else None,
        )
        return logits[:, -1]

    def _is_real(self, keys: Tensor) -> Tensor:
        """Return False where there is padding, bool [rows, keys]."""
        return (keys < self._begin) | (keys >= self._begin + self._padding[:, None])

    def _mask(self, positions: Tensor) -> Tensor:
        """Return the attention mask, bool [rows, 1, queries, keys]: earlier tokens without padding, and the own one.

        A padding token must attend to something, or its softmax would be NaN.
        """
        keys = torch.arange(int(positions[-1]) + 1, device=positions.device)
        causal = keys[None] <= positions[:, None]
        itself = keys[None] == positions[:, None]
        return (causal[None] & self._is_real(keys)[:, None] | itself[None])[:, None]


class FixedShapeDecoding(Decoding):
    """Passes of fixed shapes after the prompts: each token attends to the whole cache under a mask of its filled part.

    Nothing in such a pass waits for the GPU.
    """

    def __call__(self, tokens: Tensor) -> Tensor:
        begin = self.cache.length
        if begin == self._begin:
            return super().__call__(tokens)
        if self.cache.place is None:
            self.cache.place = torch.zeros(1, dtype=torch.int64, device=tokens.device)
            self._tokens = torch.empty_like(tokens)
            self._all = torch.arange(self.cache.max_length, device=tokens.device)
            self._real = self._is_real(self._all)
        self.cache.place.fill_(begin)
        self._tokens.copy_(tokens)
        logits = self._decode_one()
        self.cache.length = begin + 1
        return logits

    def _decode_one(self) -> Tensor:
        """Run the pass over `_tokens` [rows, 1] at `cache.place`. Repeating it writes the same values again."""
        assert self.cache.place is not None
        filled = (self._all <= self.cache.place) & self._real
        return self._pass(self._tokens, self.cache.place, filled[:, None, None])


class CapturedDecoding(FixedShapeDecoding):
    """Passes of fixed shapes, captured as a CUDA graph.

    The graph's logits are compared with those of the eager pass before it; if they differ, generation stays eager.
    """

    def __init__(self, model: MixtralModel, padding: Tensor, max_length: int, prefix: Prefix | None = None) -> None:
        super().__init__(model, padding, max_length, prefix)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._failed = False

    @property
    def is_captured(self) -> bool:
        """True if further passes are replayed."""
        return self._graph is not None

    def _decode_one(self) -> Tensor:
        if self._failed:
            return super()._decode_one()
        if self._graph is None or self._logits is None:
            return self._capture_and_compare()
        self._graph.replay()
        return self._logits

    def end(self) -> None:
        # NCCL waits for the graphs that contain its collectives.
        torch.cuda.synchronize()
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._logits = None

    def _capture_and_compare(self) -> Tensor:
        """Return an eager pass's logits. It compiles kernels and sets up libraries outside the capture that follows."""
        expected = super()._decode_one()
        for step in (self._capture, partial(self._compare, expected)):
            why = refused(step, self._padding.device)
            if why is not None:
                if why:
                    log.warning("Generation is not captured as a CUDA graph, and slower: %s.", why)
                self.end()
                self._failed = True
                break
        return expected

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = super()._decode_one()
        self._graph, self._logits = graph, logits

    def _compare(self, expected: Tensor) -> None:
        """Replay the graph. Raise RuntimeError if its logits differ."""
        # Written so that NaN counts as different.
        if not (self._decode_one() - expected).abs().max() <= CAPTURE_TOLERANCE * expected.abs().max():
            raise RuntimeError("its logits differ")


def decoding_of(model: MixtralModel, num_rows: int, num_tokens: int) -> type[Decoding]:
    """Return the fastest class for generating `num_tokens` of each of `num_rows` sequences. The same on all ranks."""
    captured = policy.captures_decoding(
        num_rows, model.mesh.expert_size, num_tokens, syncs_with_host=not model.is_capturable
    )
    return CapturedDecoding if captured else Decoding

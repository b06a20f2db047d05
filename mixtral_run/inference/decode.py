"""Passes of generation: over the prompts, then over one more token of each row at a time, on cached keys and values.

A pass over one token launches as many kernels as one over thousands, and the GPU waits for the host. In shapes that
stay it is recorded once and replayed, exchanges with other processes included, as training's is (train/cuda_graph.py).
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from mixtral_run.model.attention import KeyValueCache
from mixtral_run.model.dispatch import capacity
from mixtral_run.model.dispatch.all_gather import AllGatherDispatcher
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import refused

log = logging.getLogger(__name__)

WORTH_RECORDING = 8
"""New tokens; recording takes as long as two or three passes."""
SAME = 2e-2
"""How far logits of the recording may be from those of the pass before it, as a share of the largest: bf16 sums."""


class Decoding:
    """Passes one after the other. padding: int64 [rows], what rows have on their left; max_length: with all that comes.

    All ranks must make one, and call alike.
    """

    def __init__(self, model: MixtralModel, padding: Tensor, max_length: int) -> None:
        self._model, self._padding = model, padding
        self._ragged = bool(padding.any())
        self.cache = KeyValueCache(max_length)
        mesh, count = model.mesh, model.architecture.num_experts
        self._all_gather = (
            AllGatherDispatcher(mesh.expert_group, count, padding.device, unlimited=True)
            if mesh.expert_size > 1
            else None
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [rows, length], the prompts or what follows → logits of the last, [rows, vocabulary]."""
        begin = self.cache.length
        positions = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)
        return self._pass(tokens, positions, _mask(positions, self._padding) if self._ragged else None)

    def end(self) -> None:
        """After the last pass, and not after an error."""

    def _pass(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        model = self._model
        gathers = capacity.pays(tokens.numel(), model.mesh.expert_size, read=False)
        with model.dispatching(self._all_gather if gathers else None):
            logits = model.logits(
                tokens,
                # Padding counts as no position.
                positions=(positions[None] - self._padding[:, None]).clamp(min=0),
                mask=mask,
                cache=self.cache,
                last_only=True,
            )
        return logits[:, -1]


class StayingDecoding(Decoding):
    """After the prompts each token sees all memory of keys and values, of which a mask says what is there: shapes stay,
    and nothing waits for the GPU."""

    def __call__(self, tokens: Tensor) -> Tensor:
        begin = self.cache.length
        if begin == 0:
            return super().__call__(tokens)
        if self.cache.place is None:
            self.cache.place = torch.zeros(1, dtype=torch.int64, device=tokens.device)
            self._tokens = torch.empty_like(tokens)
            self._all = torch.arange(self.cache.max_length, device=tokens.device)
        self.cache.place.fill_(begin)
        self._tokens.copy_(tokens)
        logits = self._one_more()
        self.cache.length = begin + 1
        return logits

    def _one_more(self) -> Tensor:
        """`_tokens` [rows, 1] at `cache.place`. Any number of times: it writes the same there."""
        assert self.cache.place is not None
        there = (self._all <= self.cache.place) & (self._all >= self._padding[:, None])
        return self._pass(self._tokens, self.cache.place, there[:, None, None])


class RecordedDecoding(StayingDecoding):
    """The same, recorded. The recording is compared with the pass before it, and left where it differs."""

    def __init__(self, model: MixtralModel, padding: Tensor, max_length: int) -> None:
        super().__init__(model, padding, max_length)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Tensor | None = None
        self._failed = False

    @property
    def is_recorded(self) -> bool:
        """Whether what comes is replayed."""
        return self._graph is not None

    def _one_more(self) -> Tensor:
        if self._failed:
            return super()._one_more()
        if self._graph is None or self._recorded is None:
            return self._record()
        self._graph.replay()
        return self._recorded

    def end(self) -> None:
        # NCCL waits for the recordings that its exchanges are in.
        torch.cuda.synchronize()
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._recorded = None

    def _record(self) -> Tensor:
        """What the pass gives: kernels are compiled and libraries set up by it, outside the recording."""
        expected = super()._one_more()
        for step in (self._capture, partial(self._compare, expected)):
            why = refused(step, self._padding.device)
            if why is not None:
                if why:
                    log.warning("Generation is not recorded, and slower: %s.", why)
                self.end()
                self._failed = True
                break
        return expected

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            recorded = super()._one_more()
        self._graph, self._recorded = graph, recorded

    def _compare(self, expected: Tensor) -> None:
        """Replay; raise RuntimeError where that gives something else."""
        if not (self._one_more() - expected).abs().max() <= SAME * expected.abs().max():  # no number is not the same
            raise RuntimeError("it gives something else")


def decoding_of(model: MixtralModel, num_rows: int, num_tokens: int) -> type[Decoding]:
    """The fastest way to so many new tokens of each row. The same on all ranks."""
    size = model.mesh.expert_size
    # Else rows are sent one by one, and the host is asked how many.
    gathers = size == 1 or capacity.pays(num_rows, size, read=False)
    return RecordedDecoding if gathers and model.is_capturable and num_tokens >= WORTH_RECORDING else Decoding


def _mask(positions: Tensor, padding: Tensor) -> Tensor:
    """bool [rows, 1, queries, keys]: earlier tokens that are no padding, and always the token itself."""
    keys = torch.arange(int(positions[-1]) + 1, device=positions.device)
    causal = keys[None] <= positions[:, None]
    real = keys[None] >= padding[:, None]
    itself = keys[None] == positions[:, None]
    return (causal[None] & real[:, None] | itself[None])[:, None]

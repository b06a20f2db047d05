"""Token dispatch within one process, which has all experts: a permutation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mixtral_run.model.dispatch.base import ExpertInputs, TokenDispatcher
from mixtral_run.model.dispatch.permute import Permutation, permute, sort_by_expert, sorted_probs, unpermute
from mixtral_run.model.kernels.decoding.few_tokens import are_few, sorted_rows
from mixtral_run.model.recompute.recipe import Recipe


@dataclass(frozen=True)
class LocalTrip:
    """Arguments of `unpermute`. probs: fp32 [tokens, topk]; order and inverse: int64 [tokens·topk]."""

    probs: Tensor
    order: Tensor
    inverse: Tensor


class LocalDispatcher(TokenDispatcher[LocalTrip]):
    """Permutation of tokens by expert, and back."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(
        self, tokens: Tensor, probs: Tensor, experts: Tensor, *, recipe: Recipe | None, indexed: bool
    ) -> tuple[ExpertInputs, LocalTrip]:
        topk = experts.shape[1]
        if not indexed and recipe is None and are_few(tokens):
            rows, order, inverse, offsets = sorted_rows(tokens, experts, self._num_experts)
            return ExpertInputs(rows, Permutation(offsets)), LocalTrip(probs, order, inverse)
        order, inverse, offsets, source = sort_by_expert(experts.flatten(), self._num_experts, topk)
        if not indexed and recipe is None:
            rows = permute(tokens, source, inverse, topk)
            return ExpertInputs(rows, Permutation(offsets)), LocalTrip(probs, order, inverse)
        # The experts give the probabilities their gradient; detached here, the outputs need not be kept for it.
        trip = LocalTrip(probs.detach(), order, inverse)
        if indexed:
            permutation = Permutation(offsets, source, inverse, topk, order=order)
            return ExpertInputs(tokens, permutation, recipe, probs), trip
        assert recipe is not None
        width = tokens.shape[-1]
        recipe = recipe.then(lambda hidden, index: hidden.reshape(-1, width).index_select(0, index), source)
        rows = permute(tokens, source, inverse, topk)
        return ExpertInputs(rows, Permutation(offsets), recipe, sorted_probs(probs, order, inverse)), trip

    def combine(self, outputs: Tensor, trip: LocalTrip, residual: Tensor | None = None) -> Tensor:
        return unpermute(outputs, trip.probs, trip.order, trip.inverse, residual=residual)

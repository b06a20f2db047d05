"""The interface of token dispatchers: bring tokens to the processes of their experts, and the results back.

A dispatcher serves every MoE layer of a model. What it has to remember between `dispatch` and `combine` of one layer is
returned by the former and given to the latter, so that a layer can run again in the backward pass (recomputation).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from mixtral_run.model.dispatch.permute import Permutation
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.recompute.recipe import Recipe

Trip = TypeVar("Trip")


@dataclass(frozen=True)
class ExpertInputs:
    """Arguments for the experts of this process.

    tokens [tokens, hidden]: the permuted tokens, or, where `permutation.source` is given, the tokens that it indexes.
    recipe: how to recompute `tokens`. probs: fp32 [rows], the routing probability of each permuted token, or, where
    `permutation.order` is given, [tokens, topk], those of all choices; the experts give them their gradient
    (kernels/routing/router_probs.py).
    """

    tokens: Tensor
    permutation: Permutation
    recipe: Recipe | None = None
    probs: Tensor | None = None


class TokenDispatcher(ABC, Generic[Trip]):
    """Exchange of tokens within an expert-parallel group. All ranks of the group must call alike."""

    def begin_pass(self) -> None:
        """Prepare for another forward and backward pass of the model."""

    @abstractmethod
    def dispatch(
        self, tokens: Tensor, probs: Tensor, experts: Tensor, *, recipe: Recipe | None, indexed: bool
    ) -> tuple[ExpertInputs, Trip]:
        """Return the inputs of this process's experts, and what `combine` needs.

        Args:
            tokens: [tokens, hidden], of this process.
            probs: fp32 [tokens, topk], routing probabilities.
            experts: int64 [tokens, topk], numbers of the chosen experts.
            recipe: how to recompute `tokens` in the backward pass; None to keep what is needed there.
            indexed: True if the experts can read tokens through an index (Experts.adapted).
        """

    @abstractmethod
    def combine(self, outputs: Tensor, trip: Trip, residual: Tensor | None = None) -> Tensor:
        """Return for each token of this process the sum of its experts' outputs times probs: [tokens, hidden].

        outputs: [rows, hidden], what the experts computed of the inputs that `dispatch` returned with `trip`. residual:
        [tokens, hidden], added to the sum.
        """

    def overflowed(self, mesh: Mesh) -> bool:
        """Return True if tokens exceeded the capacity of any process since the last call. All ranks must call.

        The gradients of such passes are wrong: take them again with a dispatcher without a limit.
        """
        del mesh
        return False


def added(residual: Tensor | None, output: Tensor) -> Tensor:
    """Return residual + output, or output if there is no residual."""
    return output if residual is None else residual + output

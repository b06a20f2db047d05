"""RMSNorm whose weight is marked as having a partial gradient under sequence parallelism.

megatron-core's local norm asserts that sequence parallelism is off, but MoE with TP > 1 needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.parallel.megatron import TransformerConfig
from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.model.recompute.recipe import Recipe


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension: x / rms(x) · weight, computed in fp32, returned in x's dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Read by train/steps/step.py: each TP rank saw only its part of the sequence.
        mark(self.weight, partial=config.sequence_parallel)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.eps)

    def recipe(self, hidden: Tensor) -> Recipe:
        """Return the recipe for recomputing `forward(hidden)`; hidden is saved for this norm's own gradient anyway."""
        eps = self.eps
        return Recipe.of(
            lambda saved, weight: torch.nn.functional.rms_norm(saved, weight.shape, weight.to(saved.dtype), eps),
            hidden,
            self.weight,
        )

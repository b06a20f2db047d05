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

    def joined(self, hidden: Tensor, addition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return hidden, plus addition if given, and its norm.

        All that follows must use the first result: its gradient is added where that of the norm is computed. On a GPU
        this is one kernel forward and one backward if the weight is frozen.
        """
        if not self._is_fused(hidden):
            total = hidden if addition is None else hidden + addition
            return total, self(total)
        both: tuple[Tensor, Tensor] = _Joined.apply(hidden, addition, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return both

    def recipe(self, hidden: Tensor) -> Recipe:
        """Return the recipe for recomputing the norm that `joined` returned with `hidden`, which is saved for this
        norm's own gradient anyway.
        """
        eps, is_fused = self.eps, self._is_fused(hidden)

        def make(saved: Tensor, weight: Tensor) -> Tensor:
            if is_fused:
                from mixtral_run.model.kernels.norm_triton import add_norm

                return add_norm(saved.contiguous(), None, weight, eps)[1]
            return torch.nn.functional.rms_norm(saved, weight.shape, weight.to(saved.dtype), eps)

        return Recipe.of(make, hidden, self.weight)

    def _is_fused(self, hidden: Tensor) -> bool:
        """Return True for bf16 on GPUs, with a frozen weight, if a row fits into a program's registers."""
        if not hidden.is_cuda or hidden.dtype is not torch.bfloat16 or self.weight.requires_grad or not hidden.numel():
            return False
        from mixtral_run.model.kernels.norm_triton import MAX_WIDTH

        return self.weight.dtype is torch.bfloat16 and hidden.shape[-1] <= MAX_WIDTH


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, addition: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from mixtral_run.model.kernels.norm_triton import add_norm

        ctx.set_materialize_grads(False)
        contiguous = addition.contiguous() if addition is not None else None
        total, normed, factors = add_norm(hidden.contiguous(), contiguous, weight, eps)
        ctx.save_for_backward(total, weight, factors)
        ctx.has_addition = addition is not None
        return total if addition is not None else hidden.view_as(hidden), normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        from mixtral_run.model.kernels.norm_triton import add_norm_backward

        for_total, for_normed = gradients
        if for_normed is not None:
            rest = for_total.contiguous() if for_total is not None else None
            total, weight, factors = ctx.saved_tensors
            for_total = add_norm_backward(total, weight, factors, for_normed.contiguous(), rest)
        return for_total, for_total if ctx.has_addition else None, None, None

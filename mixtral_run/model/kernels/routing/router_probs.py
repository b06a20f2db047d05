"""The gradient of the routing probabilities without the experts' outputs.

A token's result is Σ p·y over its experts. The gradient of p is y·g, for which y would have to be saved. But y is
linear in the activation a: with the gradient d that reaches a (p times that of y, propagated through linear_fc2 and its
adapter), y·g = a·d / p. And a is recomputed for the adapter of linear_fc2 anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.recompute.recipe import Once


def with_probs(active: Tensor, probs: Tensor, again: Once) -> Tensor:
    """Return active [rows, ffn] unchanged, and give probs fp32 [rows] their gradient in the backward pass.

    The gradient is that of factors of a result which is linear in `active`. again: how to recompute active. Every use
    of active must go through the result of this function.
    """
    output: Tensor = _WithProbs.apply(active, probs, again)  # type: ignore[no-untyped-call]
    return output


class _WithProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Tensor, probs: Tensor, again: Once) -> Tensor:
        ctx.save_for_backward(probs, *again.recipe.sources)
        ctx.again = again
        return active.view_as(active)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        probs, *sources = ctx.saved_tensors
        gradient = gradients[0]
        active = ctx.again.take(*sources)
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        return gradient, over_probs(row_products(active, gradient), probs), None


def over_probs(products: Tensor, probs: Tensor) -> Tensor:
    """Return products / probs. A probability of 0 propagates no gradient; its own cannot be computed, and is set to
    0.
    """
    return torch.where(probs > 0, products / probs, 0.0)


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """Return the scalar product of each row of two tensors [rows, width]: [rows], fp32 or the inputs' wider dtype."""
    if first.is_cuda and first.numel():
        from mixtral_run.model.kernels.permute_triton import row_products as on_gpu

        return on_gpu(first.contiguous(), second.contiguous())
    wide = torch.promote_types(first.dtype, torch.float32)
    return (first.to(wide) * second.to(wide)).sum(-1)

"""The gradient of the router's weights without the experts' outputs.

A token's result is Σ w·y over its experts. The gradient of w is y·g, for which y would have to be kept. But y is linear
in the activation a, so that with the gradient d that reaches a (w times that of y, brought back through linear_fc2 and
its adapter) y·g = a·d / w: and a is made again for linear_fc2's adapter anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.recompute.recipe import Once


def with_probs(active: Tensor, probs: Tensor, again: Once) -> Tensor:
    """active [rows, ffn] as it is; in the backward pass shares fp32 [rows] get the gradient that they have as factors
    of what follows linearly. again: how to make active. Every use of active must come through the result."""
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
        # A share of nothing sends nothing back; its own gradient is lost, and nothing it could choose would matter.
        products = row_products(active, gradient)
        return gradient, torch.where(probs > 0, products / probs, 0.0), None


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """Each row's scalar product, fp32 (as wide as the inputs beyond that): both [rows, width] → [rows]."""
    if first.is_cuda and first.numel():
        from mixtral_run.model.kernels.permute_triton import row_products as on_gpu

        return on_gpu(first.contiguous(), second.contiguous())
    wide = torch.promote_types(first.dtype, torch.float32)
    return (first.to(wide) * second.to(wide)).sum(-1)

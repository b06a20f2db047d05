"""SwiGLU of the experts' first layer, with the adapter's output added in the same kernel.

    output = silu(g + s·a·Bgᵀ) · (u + s·a·Buᵀ),   g and u the halves of the layer's output, a = A·x, s = alpha / r

The adapter's output is as wide as the layer's (28,672 columns in Mixtral): written and added by itself it would cost as
much as the activation. On a GPU one Triton kernel computes it where it is needed. Elsewhere, and as the reference of
the tests, plain torch does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from mixtral_run.model.kernels.grouped_mm import (
    each_experts,
    grouped_linear,
    has_grouped_product,
    outer_product,
    product,
)
from mixtral_run.model.kernels.quantized.quantized_mm import quantize
from mixtral_run.model.kernels.routing.router_probs import over_probs, row_products

COLUMNS = 256
"""The kernels take widths of gate and up together that are multiples of this."""


def swiglu(hidden: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return silu(gate) · up [tokens, ffn] for hidden [tokens, 2·ffn], gate columns first.

    With offsets int32 [experts] this is one kernel on GPUs, which skips rows at or after the last offset.
    """
    if offsets is not None and has_grouped_product(hidden, hidden.shape[1]) and hidden.shape[1] % COLUMNS == 0:
        output: Tensor = _Fused.apply(hidden, None, None, 1.0, offsets)  # type: ignore[no-untyped-call]
        return output
    gate, up = hidden.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu_with_adapter(hidden: Tensor, inner: Tensor, outer: Tensor, scale: float, offsets: Tensor) -> Tensor:
    """Return SwiGLU of hidden + scale · inner · outerᵀ: [tokens, ffn] in hidden's dtype.

    hidden [tokens, 2·ffn]; inner = A·x [tokens, r]; outer = B [experts, 2·ffn, r]; offsets int32 [experts]. Gradients
    reach hidden, inner and outer.
    """
    if _fused_runs(hidden, inner):
        output: Tensor = _Fused.apply(hidden, inner, outer, scale, offsets)  # type: ignore[no-untyped-call]
        return output
    return swiglu(hidden + grouped_linear(inner * scale, outer, offsets))


def swiglu_of(hidden: Tensor, inner: Tensor, outer: Tensor, scale: float, offsets: Tensor) -> Tensor:
    """Compute `swiglu_with_adapter` outside autograd."""
    if _fused_runs(hidden, inner):
        from mixtral_run.model.kernels.swiglu_triton import forward

        return forward(hidden, inner, outer, scale, offsets)
    return swiglu(hidden + product(inner * scale, outer.transpose(1, 2), offsets))


def recomputing_backward(
    hidden: Tensor,
    inner: Tensor,
    outer: Tensor,
    scale: float,
    offsets: Tensor,
    gradient: Tensor,
    probs: Tensor | None = None,
    factors: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what the backward pass of `swiglu_of` needs, given the gradient of its result [tokens, ffn].

    order: int64 [tokens], the index in probs, of any shape, of each row's probability; None if they are [tokens].

    Returns:
        hidden's gradient;
        the result, recomputed bit for bit;
        for each row the scalar product of the result and its gradient, fp32 or wider [tokens], over probs if given, and
        0 where they are 0 (router_probs.py); with order, in the shape and the order of probs;
        with factors fp32 [experts, 2·ffn], the scales fp32 [tokens] with which the rows of hidden's gradient, times
        their expert's factors, are quantized (quantized_mm.quantize); otherwise None.
    """
    if _fused_runs(hidden, inner):
        from mixtral_run.model.kernels.swiglu_triton import recomputing_backward as on_gpu

        return on_gpu(hidden, inner, outer, scale, offsets, gradient.contiguous(), probs, factors, order)
    with torch.enable_grad():
        whole = (hidden + product(inner * scale, outer.transpose(1, 2), offsets)).detach().requires_grad_(True)
        active = swiglu(whole)
    (for_hidden,) = torch.autograd.grad(active, whole, gradient)
    active = active.detach()
    products = row_products(active, gradient)
    scales = None
    # On a GPU the product finds the scales itself, without waiting for the offsets.
    if factors is not None and not hidden.is_cuda:
        rows = [part.float() * each for part, each in zip(each_experts(for_hidden, offsets), factors, strict=True)]
        scales = quantize(torch.cat(rows))[1]
    if probs is not None and order is not None:
        for_probs = torch.empty_like(probs)
        for_probs.view(-1)[order] = over_probs(products, probs.flatten()[order]).to(probs.dtype)
        return for_hidden, active, for_probs, scales
    return for_hidden, active, products if probs is None else over_probs(products, probs), scales


def _fused_runs(hidden: Tensor, inner: Tensor) -> bool:
    """Return True on GPUs with the grouped product, for bf16, and sizes that fit the kernel's tiles."""
    rank = inner.shape[1]
    return (
        has_grouped_product(hidden, hidden.shape[1], rank) and rank in (16, 32, 64) and hidden.shape[1] % COLUMNS == 0
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, inner: Tensor | None, outer: Tensor | None, scale: float, offsets: Tensor
    ) -> Tensor:
        from mixtral_run.model.kernels.swiglu_triton import forward

        ctx.save_for_backward(hidden, inner, outer, offsets)
        ctx.scale = scale
        return forward(hidden, inner, outer, scale, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mixtral_run.model.kernels.swiglu_triton import backward

        hidden, inner, outer, offsets = ctx.saved_tensors
        for_hidden = backward(hidden, inner, outer, ctx.scale, offsets, gradients[0].contiguous())
        if inner is None:
            return for_hidden, None, None, None, None
        # The gradient of the adapter's output is that of hidden; both products read it once more.
        for_inner = product(for_hidden, outer, offsets, scale=ctx.scale)
        for_outer = outer_product(for_hidden, inner, offsets, scale=ctx.scale)
        return for_hidden, for_inner, for_outer, None, None

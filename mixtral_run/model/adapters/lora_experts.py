"""The experts of a layer with adapters on both linear layers, as one autograd node.

    h = W1·x + s·B1·(A1·x)      a = silu(h_gate) · h_up      y = W2·a + s·B2·(A2·a)        s = alpha / r

As separate nodes, autograd would save the activation a for A2's gradient, the rows x next to the tokens from which they
are gathered, and y for the gradient of the routing probabilities. Here only h is saved of all tensors that are as wide
as the experts: the backward pass of SwiGLU reads gate and up and recomputes a, together with each row's scalar product
of a and its gradient, which the router needs (router_probs.py). Rows are read through the index of their tokens. The
gradients of the adapters are written in their parameters' dtype, without a cast.

A layer that runs again for its backward pass needs h and A1·x only: nothing reads y, and A2·a follows from the a that
SwiGLU's backward pass computes. A third of the experts' forward products and SwiGLU are left out.

Each product has its slow reference where it is defined (grouped_mm.py, quantized_mm.py, swiglu.py). After an exchange
with other processes the received rows are the tokens, and there is no index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mixtral_run.model.adapters.cast_adapters import cast_copy
from mixtral_run.model.dispatch.permute import Permutation, add_rows
from mixtral_run.model.kernels.grouped_mm import outer_product, product, products_of_gradient
from mixtral_run.model.kernels.swiglu import recomputing_backward, swiglu_of
from mixtral_run.model.recompute.recipe import Recipe


class FrozenExperts(Protocol):
    """The weight of one linear layer of all experts, [experts, out, in], in any storage format."""

    def product(
        self,
        rows: Tensor,
        offsets: Tensor,
        source: Tensor | None = None,
        adapter: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor: ...

    def factors(self, gradient: Tensor) -> Tensor | None: ...

    def gradient(
        self, gradient: Tensor, offsets: Tensor, inner: Tensor, linear_in: Tensor, row_scales: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Adapters:
    """Adapter parameters [experts, r, in] and [experts, out, r] of both layers, and their scale alpha / r."""

    first_in: Tensor
    first_out: Tensor
    second_in: Tensor
    second_out: Tensor
    scale: float


def adapted_experts(
    tokens: Tensor,
    permutation: Permutation,
    first: FrozenExperts,
    second: FrozenExperts,
    adapters: Adapters,
    recipe: Recipe | None = None,
    probs: Tensor | None = None,
    *,
    unread: bool = False,
) -> Tensor:
    """Return the experts' outputs [rows, hidden], sorted by expert, for tokens [tokens, hidden].

    Args:
        permutation: the rows of the tokens that the experts compute.
        first, second: frozen weights of both linear layers.
        recipe: how to recompute the tokens, which then are not saved.
        probs: fp32 [rows], the routing probability of each row, or, where `permutation.order` is given, [tokens, topk],
            those of all choices; they get the gradient of factors of a result that is linear in the outputs.
        unread: True if only the gradients of the outputs are wanted. Then the outputs are zeros.
    """
    make, saved = (recipe.make, recipe.sources) if recipe is not None else (None, (tokens.detach(),))
    parts = (adapters.first_in, adapters.first_out, adapters.second_in, adapters.second_out)
    output: Tensor = _AdaptedExperts.apply(  # type: ignore[no-untyped-call]
        tokens, probs, *parts, permutation, first, second, adapters.scale, unread, make, *saved
    )
    return output


class _AdaptedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        probs: Tensor | None,
        first_in: Tensor,
        first_out: Tensor,
        second_in: Tensor,
        second_out: Tensor,
        permutation: Permutation,
        first: FrozenExperts,
        second: FrozenExperts,
        scale: float,
        unread: bool,
        make: Callable[..., Tensor] | None,
        *saved: Tensor,
    ) -> Tensor:
        parameters = (first_in, first_out, second_in, second_out)
        halves = [cast_copy(each, tokens.dtype) for each in parameters]
        offsets = permutation.offsets
        hidden = first.product(tokens, offsets, permutation.source)
        first_inner = product(tokens, halves[0].transpose(1, 2), offsets, permutation.source)
        active = swiglu_of(hidden, first_inner, halves[1], scale, offsets) if not unread else None
        second_inner = _second_inner(active, halves[2], offsets, scale) if active is not None else None
        index = (permutation.source, permutation.inverse, permutation.order)
        ctx.save_for_backward(hidden, first_inner, second_inner, probs, offsets, *index, *halves, *saved)
        ctx.layers, ctx.scale, ctx.make, ctx.topk = (first, second), scale, make, permutation.topk
        ctx.partial = permutation.partial
        ctx.dtypes = [each.dtype for each in parameters]
        if active is None or second_inner is None:
            return tokens.new_zeros(hidden.shape[0], tokens.shape[-1])
        return second.product(active, offsets, adapter=(second_inner, halves[3]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, first_inner, second_inner, probs, offsets, source, inverse, order, *rest = ctx.saved_tensors
        (first_in, first_out, second_in, second_out), saved = rest[:4], rest[4:]
        (first, second), scale = ctx.layers, ctx.scale
        gradient = gradients[0].contiguous()
        for_inner = product(gradient, second_out, offsets, scale=scale)
        for_active = second.gradient(gradient, offsets, for_inner, second_in)
        for_hidden, active, for_probs, row_scales = recomputing_backward(
            hidden, first_inner, first_out, scale, offsets, for_active, probs, first.factors(hidden), order
        )
        for_second_in = outer_product(for_inner, active, offsets, dtype=ctx.dtypes[2])
        if second_inner is None:
            second_inner = _second_inner(active, second_in, offsets, scale)
        for_second_out = outer_product(gradient, second_inner, offsets, dtype=ctx.dtypes[3])
        del active, for_active
        for_inner, for_first_out = products_of_gradient(
            for_hidden, first_out, first_inner, scale, offsets, ctx.dtypes[1]
        )
        tokens = ctx.make(*saved) if ctx.make is not None else saved[0]
        tokens = tokens.reshape(-1, tokens.shape[-1])
        for_first_in = outer_product(for_inner, tokens, offsets, source=source, dtype=ctx.dtypes[0])
        for_tokens = None
        if ctx.needs_input_grad[0]:
            for_tokens = first.gradient(for_hidden, offsets, for_inner, first_in, row_scales)
            if inverse is not None:
                for_tokens = add_rows(for_tokens, None, inverse, ctx.topk, offsets[-1:] if ctx.partial else None)
        adapters = (for_first_in, for_first_out, for_second_in, for_second_out)
        return (
            for_tokens,
            for_probs if probs is not None else None,
            *adapters,
            *(None for _ in range(6)),
            *(None for _ in saved),
        )


def _second_inner(active: Tensor, second_in: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Return s·A2·a of each row, [rows, r]."""
    return product(active, second_in.transpose(1, 2), offsets, scale=scale)

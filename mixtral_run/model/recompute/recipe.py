"""Selective recomputation: tensors that are recomputed in the backward pass instead of saved.

An adapter needs its input again for the gradient of A. If that input is a norm, an activation or a gather of something
that is saved anyway, a `Recipe` takes its place. Recipes are cheap passes over memory: they contain no matrix product,
no random numbers (dropout saves its mask), and never wait for the GPU, so that they can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Recipe:
    """Recipe for recomputing a tensor: `make(*sources)` returns it, bit for bit. Sources carry no gradient."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    @classmethod
    def of(cls, make: Callable[..., Tensor], *sources: Tensor) -> Self:
        """Return the recipe `make(*sources)` with detached sources."""
        return cls(make, tuple(source.detach() for source in sources))

    @classmethod
    def saved(cls, tensor: Tensor) -> Self:
        """Return a recipe that saves the tensor itself, for tensors that are expensive to recompute."""
        return cls.of(lambda itself: itself, tensor)

    def then(self, step: Callable[..., Tensor], *more: Tensor) -> Recipe:
        """Return the recipe of `step(tensor, *more)`, where `tensor` is the result of this recipe."""
        count, make = len(self.sources), self.make
        return Recipe(
            lambda *sources: step(make(*sources[:count]), *sources[count:]),
            (*self.sources, *(each.detach() for each in more)),
        )


class Once:
    """Recipe whose result is used twice in one backward pass: the first use computes it, the last one frees it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._made: Tensor | None = None

    def as_recipe(self) -> Recipe:
        """Return the recipe for the first use."""
        return Recipe(self._make, self.recipe.sources)

    def take(self, *sources: Tensor) -> Tensor:
        """Return the result for the last use, computed now if there was no first use, and free it."""
        made = self._made if self._made is not None else self.recipe.make(*sources)
        self._made = None
        return made

    def _make(self, *sources: Tensor) -> Tensor:
        self._made = self.recipe.make(*sources)
        return self._made


def drop(tensor: Tensor, probability: float, recipe: Recipe | None) -> tuple[Tensor, Recipe | None]:
    """Apply dropout; return the result and, given the tensor's recipe, the recipe of the result, which saves the mask.

    The random numbers are the same with a recipe and without.
    """
    dropped, mask = torch.native_dropout(tensor, probability, True)
    if recipe is None:
        return dropped, None
    scale = 1.0 / (1.0 - probability)
    return dropped, recipe.then(lambda made, saved: made * saved * scale, mask)


def recomputed_linear(hidden: Tensor, weight: Tensor, recipe: Recipe | None) -> Tensor:
    """Return hidden [.., in] · weightᵀ, weight [out, in]. With a recipe, hidden is not saved for the weight's
    gradient.
    """
    if recipe is None:
        return linear(hidden, weight)
    output: Tensor = _RecomputedLinear.apply(hidden, weight, recipe.make, *recipe.sources)  # type: ignore[no-untyped-call]
    return output


class _RecomputedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *sources)
        ctx.make = make
        return linear(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        gradient = gradients[0]
        for_hidden = gradient @ weight if ctx.needs_input_grad[0] else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            hidden = ctx.make(*sources)
            for_weight = gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)
        return (for_hidden, for_weight, None, *(None for _ in sources))

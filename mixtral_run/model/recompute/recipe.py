"""Tensors that are made again in the backward pass instead of kept: selective recomputation.

An adapter needs its input once more for the gradient of A. Where that input is a norm, an activation or a gather of
something that is kept anyway, a `Recipe` takes its place: cheap passes over memory, no matrix product, no random
number (dropout keeps its mask) and nothing that waits for the host, so that a recorded pass can hold it.
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
    """How to make a tensor again. `make(*sources)` gives it, bit for bit; sources carry no gradient."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    @classmethod
    def of(cls, make: Callable[..., Tensor], *sources: Tensor) -> Self:
        return cls(make, tuple(source.detach() for source in sources))

    @classmethod
    def kept(cls, tensor: Tensor) -> Self:
        """For what cannot be made cheaply: the tensor itself."""
        return cls.of(lambda itself: itself, tensor)

    def then(self, step: Callable[..., Tensor], *more: Tensor) -> Recipe:
        """Followed by `step(made, *more)`."""
        count, make = len(self.sources), self.make
        return Recipe(
            lambda *sources: step(make(*sources[:count]), *sources[count:]),
            (*self.sources, *(each.detach() for each in more)),
        )


class Once:
    """A recipe whose result serves two in one backward pass: the first makes it, the last takes it away."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._made: Tensor | None = None

    def as_recipe(self) -> Recipe:
        """For the first."""
        return Recipe(self._make, self.recipe.sources)

    def take(self, *sources: Tensor) -> Tensor:
        """For the last: what was made, or made now; not held on to."""
        made = self._made if self._made is not None else self.recipe.make(*sources)
        self._made = None
        return made

    def _make(self, *sources: Tensor) -> Tensor:
        self._made = self.recipe.make(*sources)
        return self._made


def drop(tensor: Tensor, probability: float, recipe: Recipe | None) -> tuple[Tensor, Recipe | None]:
    """Dropout, and how to make its result again: by the same mask. Draws the same numbers with a recipe and without."""
    dropped, mask = torch.native_dropout(tensor, probability, True)
    if recipe is None:
        return dropped, None
    scale = 1.0 / (1.0 - probability)
    return dropped, recipe.then(lambda made, kept: made * kept * scale, mask)


def recomputed_linear(hidden: Tensor, weight: Tensor, recipe: Recipe | None) -> Tensor:
    """hidden · weightᵀ; with a recipe, hidden is not kept for weight's gradient. hidden [.., in], weight [out, in]."""
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

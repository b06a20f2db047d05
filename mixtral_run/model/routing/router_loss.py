"""The load balancing loss of the routers (Fedus et al. 2021, arXiv:2101.03961), as HF's Mixtral has it.

Over the tokens of all layers together, f_e is the mean number of times that expert e is chosen, and P_e its mean
probability before the choice: loss = experts · Σ f_e · P_e. It is that of one micro batch; their losses are weighted by
their share of the loss tokens of the step. f is a constant for the gradient, and known when the forward pass ends. The
gradient is added to the router's probabilities in the backward pass, which may run a layer again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.parallel.mesh import Mesh


class RouterLoss:
    """The loss of the routers of one model. coefficient: of the loss in the sum with the cross entropy.

    Tokens after the last one of a row whose loss counts are left out: they are padding, or change nothing.
    """

    def __init__(
        self, routers: Sequence[Any], num_experts: int, topk: int, coefficient: float, mesh: Mesh, *, split: bool
    ) -> None:
        self._mesh, self._is_split = mesh, split and mesh.tensor_size > 1
        self._num_layers, self._num_experts, self._topk = len(routers), num_experts, topk
        self._coefficient = coefficient
        self._counts = False
        self._zeros = torch.zeros(2, num_experts, device=mesh.device)
        self._sums = self._zeros
        self._mask = self._scale = self._zeros[0]
        for router in routers:
            router.loss = self

    @contextmanager
    def counting(self, weights: Tensor) -> Iterator[None]:
        """Count the forward pass within. weights: fp32 [batch, sequence], of each token in the loss of the step."""
        places = torch.arange(weights.shape[1], device=weights.device)
        last = torch.where(weights > 0, places, -1).amax(dim=1)
        mask = (places[:, None] <= last).reshape(-1).float()
        num_tokens = mask.sum().clamp(min=1) * self._num_layers
        self._mask = mask.chunk(self._mesh.tensor_size)[self._mesh.tensor_rank] if self._is_split else mask
        # Of the sum of products of f and P, both still sums over tokens.
        self._scale = self._coefficient * weights.sum() * self._num_experts / num_tokens.square()
        self._sums, self._counts = self._zeros, True
        try:
            yield
        finally:
            self._counts = False
        if self._is_split:
            dist.all_reduce(self._sums, group=self._mesh.tensor_group)

    def value(self) -> Tensor:
        """Return the loss of the pass, an fp32 scalar without a gradient, which the backward pass adds by itself."""
        return (self._sums[0] * self._sums[1]).sum() * self._scale

    def attach(self, scores: Tensor) -> Tensor:
        """Return a router's probabilities fp32 [tokens, experts], with the loss's gradient for them."""
        result: Tensor = _Attach.apply(scores, self)  # type: ignore[no-untyped-call]
        return result

    def add(self, scores: Tensor) -> None:
        """Add the probabilities of one layer, unless they are computed again."""
        if self._counts:
            chosen = torch.zeros_like(scores).scatter_(1, scores.topk(self._topk, dim=-1).indices, 1.0)
            self._sums = self._sums + torch.stack((self._mask @ chosen, self._mask @ scores))

    def slope(self) -> Tensor:
        """Return the gradient of the loss for the probabilities of one layer, [tokens, experts]."""
        return self._mask[:, None] * (self._sums[0] * self._scale)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: RouterLoss) -> Tensor:
        loss.add(scores.detach())
        ctx.loss = loss
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] + ctx.loss.slope(), None

"""Reference implementation of the experts in float64, one expert at a time, for comparison with the fast paths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixtral_run.model.adapters.lora_experts import Adapters, adapted_experts
from mixtral_run.model.dispatch.permute import Permutation
from mixtral_run.model.kernels.grouped_mm import frozen_gradient, frozen_product

# Tokens of each of four experts: even, uneven, one without any, all on one, a single token, none before the last.
ROUTINGS = (
    (16, 16, 16, 16),
    (3, 40, 1, 20),
    (0, 30, 0, 34),
    (0, 0, 64, 0),
    (1, 0, 0, 0),
    (0, 0, 0, 5),
    (63, 65, 1, 127),
    (0, 0, 0, 0),
)

# For products that cut the rows of an expert into tiles of up to 256: of many sizes beside each other as well.
PRODUCT_ROUTINGS = (
    *ROUTINGS[:-1],
    (700, 310, 0, 414),
    (193, 64, 65, 192),
    (245, 614, 409, 696, 491, 573, 450, 614),
    (8, 250, 17, 130, 0, 64, 512, 39),
)


@dataclass(frozen=True)
class Case:
    """Inputs of one layer with an adapter. offsets: int32 [experts]."""

    rows: Tensor
    first: Tensor
    inner_first: Tensor
    outer_first: Tensor
    second: Tensor
    offsets: Tensor

    @classmethod
    def random(cls, routing: tuple[int, ...], hidden: int, ffn: int, rank: int, seed: int) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

        experts = len(routing)
        return cls(
            rows=torch.randn(sum(routing), hidden, generator=generator, dtype=torch.float64),
            first=draw(experts, 2 * ffn, hidden),
            inner_first=draw(experts, rank, hidden),
            outer_first=draw(experts, 2 * ffn, rank),
            second=draw(experts, hidden, ffn),
            offsets=torch.tensor(routing).cumsum(0).int(),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.first, self.inner_first, self.outer_first, self.second


def reference(case: Case, scale: float) -> Tensor:
    """Return second · (silu(g) · u), where g, u are the halves of first·x + scale · outer·inner·x."""
    outputs = []
    start = 0
    for expert, end in enumerate(case.offsets.tolist()):
        rows = case.rows[start:end]
        hidden = rows @ case.first[expert].T + scale * (rows @ case.inner_first[expert].T) @ case.outer_first[expert].T
        gate, up = hidden.chunk(2, dim=-1)
        outputs.append((gate * torch.sigmoid(gate) * up) @ case.second[expert].T)
        start = end
    return torch.cat(outputs)


@dataclass(frozen=True)
class FrozenWeight:
    """Stacked frozen weight with the interface of experts.ExpertLinear."""

    weight: Tensor

    def product(
        self,
        rows: Tensor,
        offsets: Tensor,
        source: Tensor | None = None,
        adapter: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return frozen_product(rows, self.weight, offsets, source, adapter)

    def factors(self, gradient: Tensor) -> Tensor | None:
        del gradient

    def gradient(
        self, gradient: Tensor, offsets: Tensor, inner: Tensor, linear_in: Tensor, row_scales: Tensor | None = None
    ) -> Tensor:
        assert row_scales is None
        return frozen_gradient(gradient, self.weight, offsets, inner, linear_in)


@dataclass(frozen=True)
class AdaptedCase:
    """Inputs of both layers with their adapters, in float64. probs [permuted tokens]: the factor of each in the result.

    source [permuted tokens]: the index of the original token. order: the order of permute.py if permuted tokens are
    read through an index, else None. Where a token has several, their probabilities are given by choice.
    """

    tokens: Tensor
    probs: Tensor
    halves: tuple[Tensor, Tensor, Tensor, Tensor]
    first: Tensor
    second: Tensor
    offsets: Tensor
    source: Tensor
    order: Tensor | None
    topk: int

    SCALE = 2.0

    @classmethod
    def random(
        cls, routing: tuple[int, ...], hidden: int, ffn: int, rank: int, *, by_token: bool, seed: int
    ) -> AdaptedCase:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

        count, experts = sum(routing), len(routing)
        topk = 2 if by_token and count % 2 == 0 else 1
        order = torch.randperm(count, generator=generator)
        return cls(
            tokens=draw(count // topk, hidden) * hidden**0.5,
            probs=torch.rand(count, generator=generator, dtype=torch.float64) + 0.5,
            halves=(
                draw(experts, rank, hidden),
                draw(experts, 2 * ffn, rank),
                draw(experts, rank, ffn),
                draw(experts, hidden, rank),
            ),
            first=draw(experts, 2 * ffn, hidden),
            second=draw(experts, hidden, ffn),
            offsets=torch.tensor(routing).cumsum(0).int(),
            source=order // topk if by_token else torch.arange(count),
            order=order if by_token else None,
            topk=topk,
        )

    def cast_to_bf16(self) -> AdaptedCase:
        """Return the case with its values rounded to bf16."""

        def round_all(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(each.bfloat16().double() for each in tensors)

        tokens, first, second = round_all((self.tokens, self.first, self.second))
        return replace(self, tokens=tokens, halves=round_all(self.halves), first=first, second=second)

    def exact(self) -> list[Tensor]:
        """Return outputs times probs, and the gradients of tokens, probs and adapter matrices."""
        tokens, probs, *halves = self._leaves("cpu", torch.float64)
        counts = torch.diff(self.offsets, prepend=torch.zeros(1))
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
        first_in, first_out, second_in, second_out = (half[owner] for half in halves)
        rows = tokens[self.source]
        hidden = torch.einsum("tk,tnk->tn", rows, self.first[owner])
        inner = torch.einsum("tk,trk->tr", rows, first_in)
        gate, up = (hidden + self.SCALE * torch.einsum("tr,tnr->tn", inner, first_out)).chunk(2, dim=-1)
        active = gate * torch.sigmoid(gate) * up
        output = torch.einsum("tk,tnk->tn", active, self.second[owner])
        inner = torch.einsum("tk,trk->tr", active, second_in)
        output = output + self.SCALE * torch.einsum("tr,tnr->tn", inner, second_out)
        return self._results(probs[:, None] * output, tokens, probs, halves)

    def fast(self, device: str, dtype: torch.dtype, strange: int = 0, *, unread: bool = False) -> list[Tensor]:
        """Compute `exact` by lora_experts.py, with probs and adapter matrices in fp32 if dtype is narrower.

        strange: number of rows after the last offset. They and their gradients are NaN. unread: see adapted_experts.
        """
        tokens, probs, *halves = self._leaves(device, dtype)
        offsets = self.offsets.to(device)
        rows = Permutation(offsets)
        given, counted = tokens, probs
        if strange:
            given = torch.cat((tokens, tokens.new_full((strange, tokens.shape[1]), torch.nan)))
            counted = torch.cat((probs, probs.new_zeros(strange)))
        if self.order is not None:
            inverse = torch.empty_like(self.order)
            inverse[self.order] = torch.arange(len(inverse))
            index = (self.source.to(device), inverse.to(device))
            rows = Permutation(offsets, *index, self.topk, order=self.order.to(device) if self.topk > 1 else None)
            if self.topk > 1:
                counted = probs[index[1]].view(-1, self.topk)
        layers = [FrozenWeight(each.to(device, dtype)) for each in (self.first, self.second)]
        output = adapted_experts(given, rows, *layers, Adapters(*halves, self.SCALE), None, counted, unread=unread)
        if strange:
            count = probs.shape[0]
            places = torch.arange(count, count + strange, device=device)
            output.register_hook(lambda gradient: gradient.index_fill(0, places, torch.nan))
            output = output[:count]
        return self._results(probs.detach()[:, None] * output, tokens, probs, halves)

    def _leaves(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        kinds = (dtype, *(wide,) * (1 + len(self.halves)))
        drawn = (self.tokens, self.probs, *self.halves)
        return [each.to(device, kind, copy=True).requires_grad_(True) for each, kind in zip(drawn, kinds, strict=True)]

    @staticmethod
    def _results(output: Tensor, tokens: Tensor, probs: Tensor, halves: list[Tensor]) -> list[Tensor]:
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        (output * weights.to(output)).sum().backward()
        gradients = [each.grad for each in (tokens, probs, *halves)]
        return [output.detach(), *(each for each in gradients if each is not None)]

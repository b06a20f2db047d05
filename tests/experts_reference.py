"""The experts' arithmetic written out an expert at a time, in float64: what the fast paths are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of each of four experts: even, uneven, an expert with none, all on one, a single row, none before the last.
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


@dataclass(frozen=True)
class Case:
    """Inputs of one layer with an adapter. ends: int32 [experts]."""

    rows: Tensor
    first: Tensor
    inner_first: Tensor
    outer_first: Tensor
    second: Tensor
    ends: Tensor

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
            ends=torch.tensor(routing).cumsum(0).int(),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.first, self.inner_first, self.outer_first, self.second


def reference(case: Case, scale: float) -> Tensor:
    """second · (silu(g) · u) with g, u the halves of first·x + scale · outer·inner·x, an expert at a time."""
    outputs = []
    start = 0
    for expert, end in enumerate(case.ends.tolist()):
        rows = case.rows[start:end]
        hidden = rows @ case.first[expert].T + scale * (rows @ case.inner_first[expert].T) @ case.outer_first[expert].T
        gate, up = hidden.chunk(2, dim=-1)
        outputs.append((gate * torch.sigmoid(gate) * up) @ case.second[expert].T)
        start = end
    return torch.cat(outputs)

"""The kernels of symmetric memory compared with loops; the memory of all processes is on one GPU."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mixtral_run.model.kernels.sort_triton import Routes, route
from mixtral_run.model.kernels.symmetric_memory_triton import fetch, pick, put, sum_rows


def pointers(parts: list[Tensor]) -> Tensor:
    return torch.tensor([part.data_ptr() for part in parts], device="cuda")


@dataclass(frozen=True)
class Group:
    """`size` processes: tokens [t, h], probs and experts [t, topk], routes and overflow of each."""

    size: int
    each: int
    num_rows: int
    tokens: list[Tensor]
    probs: list[Tensor]
    experts: list[Tensor]
    routes: list[Routes]
    overflow: list[Tensor]

    @staticmethod
    def random(size: int, num_tokens: int, hidden: int, num_experts: int, *, capacity: int) -> "Group":
        topk, each = 2, num_experts // size
        tokens = [torch.randn(num_tokens, hidden, device="cuda").bfloat16() for _ in range(size)]
        probs = [torch.rand(num_tokens, topk, device="cuda") for _ in range(size)]
        experts = [torch.rand(num_tokens, num_experts, device="cuda").topk(topk).indices.int() for _ in range(size)]
        overflow = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(size)]
        given = (pointers(probs), pointers(experts), (num_tokens, topk), num_experts)
        routes = [
            route(*given, range(rank * each, (rank + 1) * each), capacity, overflow[rank]) for rank in range(size)
        ]
        return Group(size, each, capacity, tokens, probs, experts, routes, overflow)

    def order(self) -> Tensor:
        return torch.cat(self.experts).flatten().long().argsort(stable=True)

    def rows_of(self, rank: int) -> Tensor:
        """Return the choices whose experts process `rank` has, in order."""
        owners = torch.cat(self.experts).flatten()[self.order()] // self.each
        return self.order()[owners == rank]


CASES = [(4, 300, 1536, 8), (2, 1, 64, 8), (8, 70, 4096, 8), (4, 33, 128, 24)]


@pytest.mark.parametrize("case", CASES)
def test_rows_and_the_way_back(case: tuple[int, int, int, int]) -> None:
    size, num_tokens, hidden, _ = case
    group = Group.random(*case, capacity=2 * size * num_tokens)
    inverse = group.order().argsort().view(-1, 2)
    rows, row_probs = [], []
    for rank, routes in enumerate(group.routes):
        mine = group.rows_of(rank)
        count = len(mine)
        assert int(group.overflow[rank]) == 0 and int(routes.offsets[-1]) == count
        assert torch.equal(routes.inverse.long(), inverse)
        assert torch.equal(routes.source[:count].long(), mine // 2)
        assert torch.equal(routes.row_probs[:count], torch.cat(group.probs).flatten()[mine])
        expected = torch.cat(group.tokens)[mine // 2]
        for weighted in (False, True):
            found = fetch(pointers(group.tokens), routes, num_tokens, group.tokens[0], weighted=weighted)
            factor = routes.row_probs[:count, None] if weighted else 1.0
            assert torch.equal(found[:count], (expected.float() * factor).bfloat16())
        laid = torch.full((group.num_rows, hidden), torch.nan, device="cuda").bfloat16()
        put(torch.randn(group.num_rows, hidden, device="cuda").bfloat16(), routes, laid)
        assert not laid[:count].isnan().any() and laid[count:].isnan().all()
        rows.append(laid)
        row_probs.append(torch.randn(group.num_rows, device="cuda"))
    starts = [sum(len(group.rows_of(before)) for before in range(rank)) for rank in range(size)]
    for rank, routes in enumerate(group.routes):
        own = slice(rank * num_tokens, (rank + 1) * num_tokens)
        owners = group.experts[rank].long() // group.each
        at = inverse[own] - torch.tensor(starts, device="cuda")[owners]
        parts = torch.stack(rows)[owners, at].float()
        for probs in (None, group.probs[rank]):
            found = sum_rows(pointers(rows), routes, own, probs, rows[0])
            expected = (parts if probs is None else parts * probs[..., None]).sum(1)
            torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
        assert torch.equal(pick(pointers(row_probs), routes, own), torch.stack(row_probs)[owners, at])


def test_rows_beyond_the_capacity_are_counted_and_left_out() -> None:
    group = Group.random(4, 200, 64, 8, capacity=150)
    for rank, routes in enumerate(group.routes):
        count = len(group.rows_of(rank))
        assert count > 150 and int(group.overflow[rank]) == count - 150
        assert int(routes.offsets[-1]) == 150 and (routes.offsets <= 150).all()
        assert torch.equal(routes.source.long(), group.rows_of(rank)[:150] // 2)

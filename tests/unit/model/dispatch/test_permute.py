"""Reordering of blocks of rows, forward and backward."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from mixtral_run.model.dispatch.permute import regroup


@pytest.mark.parametrize("senders", [1, 2, 3, 8])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_regroup_is_the_sort_by_expert(senders: int, experts: int) -> None:
    generator = random.Random(8 * senders + experts)
    for most in (0, 1, 7):
        sizes = [generator.randint(0, most) for _ in range(senders * experts)]
        there = [sender * experts + expert for expert in range(experts) for sender in range(senders)]
        back = [expert * senders + sender for sender in range(senders) for expert in range(experts)]
        rows = torch.randn(sum(sizes), 5, dtype=torch.float64, requires_grad=True)
        owners = [number % experts for number, size in enumerate(sizes) for _ in range(size)]
        order = torch.tensor(owners, dtype=torch.long).argsort(stable=True)
        found = regroup(rows, sizes, there)
        assert torch.equal(found, rows[order])
        gradient = torch.randn_like(found)
        (mine,) = torch.autograd.grad(found, rows, gradient)
        (expected,) = torch.autograd.grad(rows[order], rows, gradient)
        assert torch.equal(mine, expected)
        assert torch.equal(regroup(found, [sizes[block] for block in there], back), rows)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_any_order(order: tuple[int, ...]) -> None:
    blocks = [torch.full((size, 2), float(size)) for size in (2, 0, 3)]
    assert torch.equal(regroup(torch.cat(blocks), (2, 0, 3), order), torch.cat([blocks[block] for block in order]))

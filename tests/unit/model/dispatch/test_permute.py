"""Reordering of rows and of blocks of rows, forward and backward: numbers by hand, loops, and torch's own sort."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from mixtral_run.model.dispatch.permute import permute, regroup, sort_by_expert, unpermute


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


# Three tokens, each with two of three experts: choices 0 … 5 are experts 2, 0, 0, 1, 2, 0.
CHOSEN = torch.tensor([2, 0, 0, 1, 2, 0])
# By hand: expert 0 has choices 1, 2, 5; expert 1 has 3; expert 2 has 0, 4.
ORDER, INVERSE, OFFSETS = [1, 2, 5, 3, 0, 4], [4, 0, 1, 3, 5, 2], [3, 4, 6]
SOURCE = [0, 1, 2, 1, 0, 2]


def test_choices_are_sorted_stably() -> None:
    order, inverse, offsets, source = sort_by_expert(CHOSEN, 3, 2)
    assert source.tolist() == SOURCE
    assert (order.tolist(), inverse.tolist(), offsets.tolist()) == (ORDER, INVERSE, OFFSETS)
    assert offsets.dtype is torch.int32
    # An expert that nobody chose, before, between and after others.
    assert sort_by_expert(torch.tensor([3, 1, 3]), 5).offsets.tolist() == [0, 1, 1, 3, 3]


def test_rows_and_their_gradients_by_hand() -> None:
    """Rows are tokens 0, 1, 2, 1, 0, 2. A token's gradient is the sum of those of its rows."""
    tokens = torch.tensor([[1.0], [10.0], [100.0]], requires_grad=True)
    rows = permute(tokens, torch.tensor(SOURCE), torch.tensor(INVERSE), 2)
    assert rows.flatten().tolist() == [1.0, 10.0, 100.0, 10.0, 1.0, 100.0]
    rows.backward(torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]]))
    assert tokens.grad.flatten().tolist() == [1.0 + 16.0, 2.0 + 8.0, 4.0 + 32.0]


def test_sums_and_their_gradients_by_hand() -> None:
    """Token 0 has rows 4 and 0, token 1 rows 1 and 3, token 2 rows 5 and 2."""
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]], requires_grad=True)
    probs = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]], requires_grad=True)
    tokens = unpermute(rows, probs, torch.tensor(ORDER), torch.tensor(INVERSE))
    assert tokens.flatten().tolist() == [0.25 * 5 + 0.75 * 1, 0.5 * 2 + 0.5 * 4, 6.0]
    tokens.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert rows.grad.flatten().tolist() == [0.75, 5.0, 0.0, 5.0, 0.25, 100.0]
    assert probs.grad.tolist() == [[5.0, 1.0], [20.0, 40.0], [600.0, 300.0]]


def test_rows_of_other_processes_count_nothing() -> None:
    """Only the first four rows are of this process: token 0 keeps row 0, token 1 rows 1 and 3, token 2 row 2."""
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    probs = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.5]])
    tokens = unpermute(rows, probs, torch.tensor(ORDER), torch.tensor(INVERSE), torch.tensor(4))
    assert tokens.flatten().tolist() == [0.75, 1.0 + 2.0, 1.5]
    tokens.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert rows.grad.flatten().tolist() == [0.75, 5.0, 50.0, 5.0]


def test_sums_over_wide_rows_agree_with_loops() -> None:
    generator = torch.Generator().manual_seed(4)
    num_tokens, topk, experts, width = 7, 3, 4, 5
    tokens, probs = (
        torch.randn(num_tokens, width, generator=generator),
        torch.rand(num_tokens, topk, generator=generator),
    )
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:topk] for _ in range(num_tokens)])
    order, inverse, offsets, source = sort_by_expert(chosen.flatten(), experts, topk)
    rows = permute(tokens, source, inverse, topk)
    computed, first = torch.empty_like(rows), 0
    for expert, last in enumerate(offsets.tolist()):
        computed[first:last] = rows[first:last] * (expert + 1) + expert
        first = last
    expected = torch.zeros(num_tokens, width)
    for token in range(num_tokens):
        for k in range(topk):
            expert = int(chosen[token, k])
            expected[token] += probs[token, k] * (tokens[token] * (expert + 1) + expert)
    torch.testing.assert_close(unpermute(computed, probs, order, inverse), expected)


def test_a_residual_is_added_and_gets_the_gradient_of_the_sum() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]], requires_grad=True)
    residual = torch.tensor([[0.5], [-8.0], [0.0]], requires_grad=True)
    probs = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    tokens = unpermute(rows, probs, torch.tensor(ORDER), torch.tensor(INVERSE), residual=residual)
    assert tokens.flatten().tolist() == [2.0 + 0.5, 3.0 - 8.0, 6.0]
    tokens.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert residual.grad.flatten().tolist() == [1.0, 10.0, 100.0]
    assert rows.grad.flatten().tolist() == [0.75, 5.0, 0.0, 5.0, 0.25, 100.0]

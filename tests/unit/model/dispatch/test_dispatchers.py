"""Dispatch and combine in one process, and the capacity of processes for permuted tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_run.model.dispatch.local import LocalDispatcher
from mixtral_run.model.dispatch.overflow import RowCapacity
from mixtral_run.model.recompute.recipe import Recipe

TOKENS, TOPK, EXPERTS, HIDDEN = 11, 2, 4, 3


def routing() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, probs and experts; nobody chooses the last expert."""
    generator = torch.Generator().manual_seed(5)
    tokens, probs = (
        torch.rand(TOKENS, width, generator=generator, dtype=torch.float64).requires_grad_(True)
        for width in (HIDDEN, TOPK)
    )
    experts = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(TOPK).indices
    return tokens, probs, experts


@pytest.mark.parametrize(("indexed", "recomputes"), [(False, False), (False, True), (True, False), (True, True)])
def test_each_token_is_the_weighted_sum_of_its_experts(indexed: bool, recomputes: bool) -> None:
    """The experts multiply by their number, from 1."""
    tokens, probs, experts = routing()
    dispatcher = LocalDispatcher(EXPERTS)
    recipe = Recipe.saved(tokens) if recomputes else None
    inputs, trip = dispatcher.dispatch(tokens, probs, experts, recipe=recipe, indexed=indexed)
    rows, permutation = inputs.tokens, inputs.permutation
    assert (permutation.source is not None) == indexed
    assert (inputs.probs is not None) == (indexed or recomputes)
    if permutation.source is not None:
        rows = rows[permutation.source]
    elif inputs.recipe is not None:
        assert torch.equal(inputs.recipe.make(*inputs.recipe.sources), rows)
    counts = torch.diff(permutation.offsets, prepend=torch.zeros(1, dtype=torch.int32))
    assert counts.tolist() == torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()
    factors = torch.arange(1, EXPERTS + 1).repeat_interleave(counts)
    result = dispatcher.combine(rows * factors[:, None], trip)
    residual = torch.randn(result.shape, dtype=result.dtype)
    assert torch.equal(dispatcher.combine(rows * factors[:, None], trip, residual), residual + result)
    expected = tokens * (probs * (experts + 1)).sum(1, keepdim=True)
    torch.testing.assert_close(result, expected)
    if inputs.probs is None:
        wanted = torch.autograd.grad(expected.square().sum(), (tokens, probs))
        found = torch.autograd.grad(result.square().sum(), (tokens, probs))
        torch.testing.assert_close(found, wanted)
    else:
        # Each row's probability goes to the experts, which give it its gradient: with an index by choice.
        given = inputs.probs.flatten() if permutation.order is None else inputs.probs.flatten()[permutation.order]
        assert (permutation.order is None) == (not indexed)
        assert torch.equal(given, probs.flatten()[experts.flatten().argsort(stable=True)])
        (found,) = torch.autograd.grad(result.square().sum(), tokens)
        (wanted,) = torch.autograd.grad(
            (tokens * (probs.detach() * (experts + 1)).sum(1, keepdim=True)).square().sum(), tokens
        )
        torch.testing.assert_close(found, wanted)


def test_one_process_never_overflows() -> None:
    mesh: Any = SimpleNamespace(expert_size=1)
    assert not LocalDispatcher(EXPERTS).overflowed(mesh)


def test_rows_beyond_the_capacity_are_counted_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the largest excess of all layers matters, and asking resets the counter."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    mesh: Any = SimpleNamespace(expert_size=4)
    limit = RowCapacity(torch.device("cpu"))
    assert limit.num_rows(100, 4) < 100
    assert RowCapacity(torch.device("cpu"), unlimited=True).num_rows(100, 4) == 100
    for offsets, bounded, overflow in (([3, 10], [3, 8], 2), ([9, 9], [8, 8], 2), ([1, 4], [1, 4], 2)):
        assert limit.bound(torch.tensor(offsets, dtype=torch.int32), 8).tolist() == bounded
        assert int(limit.overflow) == overflow
    assert limit.exceeded(mesh)
    assert not limit.exceeded(mesh)

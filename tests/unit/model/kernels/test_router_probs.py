"""The router's gradient from activations compared with that from the experts' outputs, in float64."""

import pytest
import torch

from mixtral_run.model.dispatch.permute import permute, unpermute
from mixtral_run.model.kernels.grouped_mm import grouped_linear
from mixtral_run.model.kernels.routing.router_probs import row_products, with_probs
from mixtral_run.model.kernels.swiglu import swiglu
from mixtral_run.model.recompute.recipe import Once, Recipe, drop

TOKENS, TOPK, HIDDEN, FFN, EXPERTS, RANK = 23, 2, 8, 12, 4, 3


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("smallest", [0.3, 1e-12])
def test_all_gradients_are_the_same(with_adapter: bool, dropout: float, smallest: float) -> None:
    torch.manual_seed(4)
    tokens, first, second = draw(TOKENS, HIDDEN), draw(EXPERTS, 2 * FFN, HIDDEN), draw(EXPERTS, HIDDEN, FFN)
    inner, outer = draw(EXPERTS, RANK, FFN).requires_grad_(True), draw(EXPERTS, HIDDEN, RANK).requires_grad_(True)
    probs = torch.rand(TOKENS, TOPK, dtype=torch.float64)
    probs[:5, 1] = smallest
    chosen = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(TOKENS)]).flatten()
    order = chosen.argsort(stable=True)
    inverse = order.argsort()
    offsets = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int()
    results = []
    for by_activation in (False, True):
        torch.manual_seed(8)
        leaves = [tokens.clone().requires_grad_(True), probs.clone().requires_grad_(True)]
        hidden = grouped_linear(permute(leaves[0], order // TOPK, inverse, TOPK), first, offsets)
        active, recipe = swiglu(hidden), None
        weights = leaves[1]
        if by_activation:
            again = Once(Recipe.of(swiglu, hidden))
            active = with_probs(active, weights.flatten().index_select(0, order), again)
            recipe, weights = again.as_recipe(), weights.detach()
        output = grouped_linear(active, second, offsets)
        if with_adapter:
            dropped, recipe = drop(active, dropout, recipe) if dropout else (active, recipe)
            output = output + grouped_linear(grouped_linear(dropped, inner, offsets, recipe), outer, offsets)
        result = unpermute(output, weights, order, inverse)
        for each in (inner, outer):
            each.grad = None
        (result * torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)).sum().backward()
        found = [*leaves, *((inner, outer) if with_adapter else ())]
        results.append([result.detach(), *(each.grad.clone() for each in found)])
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def test_a_probability_of_zero_gets_a_finite_gradient() -> None:
    probs = torch.tensor([0.0, 0.5], requires_grad=True)
    active = torch.randn(2, 6, requires_grad=True)
    result = with_probs(active, probs, Once(Recipe.saved(active)))
    (result * probs.detach()[:, None]).sum().backward()
    assert probs.grad is not None
    assert probs.grad[0] == 0
    torch.testing.assert_close(probs.grad[1], active.detach()[1].sum())


def test_a_recomputed_tensor_is_freed_after_its_last_use() -> None:
    calls = []
    once = Once(Recipe.of(lambda source: calls.append(1) or source * 2, torch.ones(3)))
    recipe = once.as_recipe()
    assert torch.equal(recipe.make(*recipe.sources), once.take(*recipe.sources))
    assert len(calls) == 1 and once._made is None
    assert torch.equal(once.take(*recipe.sources), torch.full((3,), 2.0))
    assert len(calls) == 2


def test_row_products_are_summed_in_fp32() -> None:
    first, second = torch.randn(5, 1000).bfloat16(), torch.randn(5, 1000).bfloat16()
    expected = (first.double() * second.double()).sum(-1)
    torch.testing.assert_close(row_products(first, second).double(), expected, rtol=1e-4, atol=1e-4)

"""LoRA in numbers by hand and in naive loops.

alpha is neither the rank nor twice the rank: a scale of 1 or 2, or the inverse of the right one, gives another result.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.adapters.lora import (
    LinearAdapter,
    _Weight,
    adapted_linear,
    initial_linear_in,
    initial_linear_ins,
)
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.recompute.recipe import Recipe
from mixtral_run.weights.adapter.merge import Adding
from mixtral_run.weights.adapter.peft_config import scale_of
from mixtral_run.weights.adapter.schema import Place


def settings(rank: int, alpha: float, dropout: float = 0.0) -> LoraSettings:
    return LoraSettings(rank, alpha, dropout, ("linear_qkv",), 1)


def test_experts_that_are_drawn_together_are_those_that_are_drawn_alone() -> None:
    lora = settings(4, 6.0)
    together = initial_linear_ins(4, 24, lora, "linear_fc1", 3, range(2, 6))
    alone = [initial_linear_in(4, 24, lora, "linear_fc1", 3, expert) for expert in range(2, 6)]
    assert torch.equal(torch.stack(together), torch.stack(alone))
    assert len({float(each[0, 0]) for each in together}) == 4


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    config = FinetuneConfig(load=Path("a"), save=Path("b"), mock_data=True, lora_rank=16, lora_alpha=6.0)
    assert LoraSettings.from_config(config).scale == 0.375
    rslora = LoraSettings.from_config(replace(config, lora_scaling="rslora"))
    assert rslora.scale == 1.5
    assert rslora.to_mapping()["lora_scaling"] == "rslora"


def test_experts_have_their_own_rank_and_alpha() -> None:
    config = FinetuneConfig(load=Path("a"), save=Path("b"), mock_data=True, lora_rank=16, lora_alpha=8.0)
    lora = LoraSettings.from_config(replace(config, lora_rank_experts=4))
    assert [lora.of(name).scale for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")] == [
        0.5,
        0.5,
        2,
        2,
    ]
    lora = LoraSettings.from_config(replace(config, lora_rank_experts=4, lora_alpha_experts=6.0))
    assert (lora.of("linear_fc2").rank, lora.of("linear_fc2").scale) == (4, 1.5)
    assert lora.to_mapping()["lora_rank_experts"] == 4
    with pytest.raises(ConfigError, match="expected linear_fc1 or linear_fc2 in --lora-target-modules; found none"):
        replace(config, lora_rank_experts=4, lora_target_modules=("linear_qkv",)).check()


def test_a_shared_adapter_cannot_start_from_the_weights() -> None:
    config = FinetuneConfig(load=Path("a"), save=Path("b"), mock_data=True, expert_adapters="shared")
    assert LoraSettings.from_config(config.check()).to_mapping()["expert_adapters"] == "shared"
    with pytest.raises(ConfigError, match="expected --expert-adapters each, since a shared adapter cannot start"):
        replace(config, init_lora="pissa").check()
    with pytest.raises(ConfigError, match="--expert-adapters shared: expected linear_fc1 or linear_fc2"):
        replace(config, lora_target_modules=("linear_qkv",)).check()


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, 6.0, 1.5), (2, 5.0, 2.5), (8, 2.0, 0.25), (16, 24.0, 1.5)])
def test_the_scale_is_alpha_over_rank(rank: int, alpha: float, scale: float) -> None:
    assert settings(rank, alpha).scale == scale
    peft = {"lora_alpha": alpha}
    assert scale_of(peft, "layers.0.q_proj", rank) == scale
    assert scale_of(peft | {"use_rslora": True}, "layers.0.q_proj", rank) == pytest.approx(alpha / rank**0.5)
    assert scale_of(peft | {"alpha_pattern": {"q_proj": 3 * alpha}}, "layers.0.q_proj", rank) == 3 * scale
    assert scale_of(peft | {"alpha_pattern": {"q_proj": 3 * alpha}}, "layers.0.k_proj", rank) == scale


def test_settings_come_from_the_flags_of_their_own_name() -> None:
    config = FinetuneConfig(load=Path("b"), save=Path("s"), lora_rank=3, lora_alpha=7.0, lora_dropout=0.25, seed=11)
    found = LoraSettings.from_config(config)
    assert (found.rank, found.alpha, found.dropout, found.seed) == (3, 7.0, 0.25, 11)
    mapping = found.to_mapping()
    assert (mapping["lora_rank"], mapping["lora_alpha"], mapping["lora_dropout"]) == (3, 7.0, 0.25)


def adapter_of(a: Tensor, b: Tensor, alpha: float) -> LinearAdapter:
    lora = settings(a.shape[0], alpha)
    return LinearAdapter(_Weight(a, None, False), _Weight(b, 0, False), lora).eval()


def test_one_layer_by_hand(mesh: Mesh) -> None:
    """x = (1, 2), A = ((1, 0), (3, 1)), A·x = (1, 5); alpha / r = 5 / 2, so that B·(1, 5) · 2.5 with
    B = ((2, 0), (0, 1), (1, 1)) is (5, 12.5, 15). W·x with W = ((1, 1), (0, 1), (2, 0)) is (3, 2, 2).
    """
    a, b = torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    weight, hidden = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([[[1.0, 2.0]]])
    adapter = adapter_of(a, b, 5.0)
    assert adapter.inner(hidden, None).tolist() == [[[1.0, 5.0]]]
    assert adapter.outer(torch.tensor([1.0, 5.0])).tolist() == [5.0, 12.5, 15.0]
    assert adapted_linear(hidden, weight, adapter, None).tolist() == [[[8.0, 14.5, 17.0]]]


def test_gradients_of_one_layer_by_hand(mesh: Mesh) -> None:
    """The same layer, loss = y₁ (the second output): dy = (0, 1, 0).

    dB = 2.5 · dy ⊗ (A·x) = rows 0, (2.5, 12.5), 0. Bᵀ·dy = (0, 1), so dA = 2.5 · (0, 1) ⊗ x = rows 0, (2.5, 5).
    dx = Wᵀ·dy + 2.5 · Aᵀ·(0, 1) = (0, 1) + (7.5, 2.5).
    """
    a, b = torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    for recipe_of in (lambda _: None, Recipe.saved):
        hidden = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
        adapter = adapter_of(a, b, 5.0)
        adapted_linear(hidden, weight, adapter, recipe_of(hidden))[..., 1].sum().backward()
        assert adapter.linear_in.weight.grad.tolist() == [[0.0, 0.0], [2.5, 5.0]]
        assert adapter.linear_out.weight.grad.tolist() == [[0.0, 0.0], [2.5, 12.5], [0.0, 0.0]]
        assert hidden.grad.tolist() == [[[7.5, 3.5]]]


def test_both_ways_through_a_layer_agree_with_loops(mesh: Mesh) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, outputs, rank, count, scale = 3, 4, 2, 5, 3.5
    w, a, b, x, dy = (
        torch.randn(shape, generator=generator)
        for shape in ((outputs, inputs), (rank, inputs), (outputs, rank), (count, 1, inputs), (count, 1, outputs))
    )
    y, da, db = torch.zeros(count, outputs), torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    for n in range(count):
        for o in range(outputs):
            for i in range(inputs):
                y[n, o] += w[o, i] * x[n, 0, i]
                for r in range(rank):
                    y[n, o] += scale * b[o, r] * a[r, i] * x[n, 0, i]
                    da[r, i] += scale * dy[n, 0, o] * b[o, r] * x[n, 0, i]
                    db[o, r] += scale * dy[n, 0, o] * a[r, i] * x[n, 0, i]
    for fused in (True, False):
        adapter = adapter_of(a, b, scale * rank)
        if fused:
            found = adapted_linear(x, w, adapter, None)
        else:
            found = torch.nn.functional.linear(x, w) + adapter.outer(adapter.inner(x, None))
        found.backward(dy)
        torch.testing.assert_close(found[:, 0], y)
        torch.testing.assert_close(adapter.linear_in.weight.grad, da)
        torch.testing.assert_close(adapter.linear_out.weight.grad, db)


@pytest.mark.parametrize(("dropout", "training", "size", "alone"), [
    (0.0, True, 1, True), (0.1, False, 1, True), (0.1, True, 1, False), (0.0, False, 2, False),
])  # fmt: skip
def test_the_fused_node_is_for_whole_layers_without_dropout(
    mesh: Mesh, dropout: float, training: bool, size: int, alone: bool
) -> None:
    lora = settings(1, 3.0, dropout)
    adapter = LinearAdapter(_Weight(torch.ones(1, 2), None, False), _Weight(torch.ones(2, 1), 0, False), lora)
    group: Any = SimpleNamespace(size=lambda: size)
    assert adapter.train(training).stands_alone(group) == alone


def test_the_first_a_is_within_its_bound_and_differs_by_place_and_seed() -> None:
    lora = settings(8, 3.0)
    drawn = initial_linear_in(8, 400, lora, "linear_qkv", 0)
    assert drawn.shape == (8, 400) and drawn.dtype is torch.float32
    # ±1 / sqrt(400): the largest of 3,200 uniform numbers is all but at the bound, and their mean near 0.
    assert 0.0495 < drawn.max() <= 0.05 and -0.05 <= drawn.min() < -0.0495 and abs(drawn.mean()) < 0.003
    assert torch.equal(drawn, initial_linear_in(8, 400, lora, "linear_qkv", 0))
    others = [
        initial_linear_in(8, 400, lora, "linear_qkv", 1),
        initial_linear_in(8, 400, lora, "linear_proj", 0),
        initial_linear_in(8, 400, lora, "linear_qkv", 0, 1),
        initial_linear_in(8, 400, LoraSettings(8, 3.0, 0.0, ("linear_qkv",), 2), "linear_qkv", 0),
    ]
    assert not any(torch.equal(drawn, each) for each in others)


def test_a_merge_adds_the_scaled_product_to_its_own_rows() -> None:
    """Rows 1 and 2 of three: W + 2.5 · B·A with A = ((1, 2), (0, 1)), B = ((9, 9), (1, 0), (0, 2)):
    B·A = (_, (1, 2), (0, 2)).
    """
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]])
    factors: Any = SimpleNamespace(
        a=lambda _: a, b=lambda _: b, scale=lambda _: 2.5, places={"any": Place("linear_qkv", (0,), ())}
    )
    weight = torch.tensor([[1.0, 1.0], [10.0, 10.0]], dtype=torch.bfloat16)
    merged = Adding(factors, "any", torch.bfloat16).to_rows(weight, 1, 3)
    assert merged.dtype is torch.bfloat16
    assert merged.tolist() == [[3.5, 6.0], [10.0, 15.0]]

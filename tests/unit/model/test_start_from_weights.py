"""Adapters that start from the weights, against PEFT's own initialization of the same matrices."""

from __future__ import annotations

import pytest
import torch

from mixtral_run.model import start_from_weights as start
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model, is_adapter
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.without_adapters import without_adapters
from tests.multiprocess.conftest import SMALL


def settings(kind: str, rank: int = 4) -> LoraSettings:
    return LoraSettings(rank, 10.0, 0.0, ("linear_qkv", "linear_fc1", "linear_fc2"), init=kind, expert_rank=2)


def peft_product(weight: torch.Tensor, kind: str, lora: LoraSettings) -> torch.Tensor:
    """Return what PEFT takes out of the weight: the product of its own start, by its own code."""
    from peft import LoraConfig, get_peft_model

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=["0"], init_lora_weights=kind)
    module = get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    assert (module.base_layer.weight - weight).abs().max() > 0.01
    return weight - module.base_layer.weight.detach()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 40)])
def test_the_start_is_that_of_peft(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    lora = settings(kind).of("linear_qkv")
    inner, outer = start.factors_of(weight, lora, "any")
    assert (inner.shape, outer.shape) == ((4, shape[1]), (shape[0], 4))
    assert torch.allclose(lora.scale * outer @ inner, peft_product(weight, kind, lora), atol=1e-5)


def test_a_large_weight_is_decomposed_almost_exactly_and_always_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(60, 50, generator=torch.Generator().manual_seed(1))
    weight = weight @ torch.diag(0.8 ** torch.arange(50.0))
    lora = settings("pissa").of("linear_qkv")
    inner, outer = start.factors_of(weight, lora, "any")
    monkeypatch.setattr(start, "LARGEST_EXACT", 8)
    state = torch.random.get_rng_state()
    first, second = start.factors_of(weight, lora, "any")
    assert torch.allclose(second @ first, outer @ inner, atol=1e-4)
    assert torch.equal(first, start.factors_of(weight, lora, "any")[0])
    assert torch.equal(state, torch.random.get_rng_state())


def model_of(mesh: Mesh, kind: str, precision: str = "bf16") -> MixtralModel:
    model = build_model(SMALL, ModelSettings(torch.float32, True, settings(kind), "none", precision), mesh)
    generator = torch.Generator().manual_seed(5)

    def fill() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and not is_adapter(name) and not parameter.is_meta:
                    parameter.normal_(0.0, 0.1, generator=generator)

    fill()
    model.quantize_experts(fill)
    return model


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_model_starts_unchanged_and_its_weights_stay(mesh: Mesh, kind: str) -> None:
    model = model_of(mesh, kind)
    before = {name: each.detach().clone() for name, each in model.named_parameters() if not is_adapter(name)}
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        with without_adapters(model):
            expected = model.logits(tokens)
        start.start_from_weights(model)
        assert torch.allclose(model.logits(tokens), expected, atol=1e-5)
        qkv = model.gpt.decoder.layers[1].self_attention.linear_qkv
        for parameter in (qkv.adapter.linear_out.weight, model.experts[0].linear_fc1.linear_out):
            assert parameter.abs().max() > 1e-3
            parameter.mul_(1.5)
            assert (model.logits(tokens) - expected).abs().max() > 1e-4
        with without_adapters(model):
            assert torch.equal(model.logits(tokens), expected)
    assert all(torch.equal(before[name], each) for name, each in model.named_parameters() if name in before)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_a_quantized_base_gives_the_start_of_its_own_weights(mesh: Mesh, precision: str) -> None:
    """Not of the weights before quantization, which a run that reads the quantized cache does not have."""
    model = model_of(mesh, "pissa", precision)
    start.start_from_weights(model)
    experts = model.experts[1].linear_fc2
    assert experts.weight is None
    exact = torch.linalg.svd(experts.dense_weight(3))
    largest = exact[0][:, :2] @ torch.diag(exact[1][:2]) @ exact[2][:2]
    assert torch.allclose(experts.lora.scale * experts.initial_out[3] @ experts.initial_in[3], largest, atol=1e-4)

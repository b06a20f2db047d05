"""Attention and the output layer in 8 bit: numbers, products and a whole model, compared with float64."""

import itertools
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model import mixtral
from mixtral_run.model import start_from_weights as start
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.kernels.quantized import dense_mm
from mixtral_run.model.kernels.quantized.dense_mm import EightBitWeight, eight_bit_linear
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model, is_adapter
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.train.preferences.reference import ReferenceFile
from tests.multiprocess.conftest import SMALL


def e4m3() -> Tensor:
    """Return all numbers of float8 e4m3 by their codes, float64: a sign, four bits of exponent, three of mantissa."""
    numbers = []
    for sign, exponent, mantissa in itertools.product((1.0, -1.0), range(16), range(8)):
        size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
        numbers.append(float("nan") if (exponent, mantissa) == (15, 7) else sign * size)
    return torch.tensor(numbers, dtype=torch.float64)


def rounded(rows: Tensor) -> Tensor:
    """Return rows, float64, as they are in 8 bit: each number is the nearest code times the row's scale."""
    scales = rows.abs().amax(-1, keepdim=True) / 448
    codes = e4m3()[~e4m3().isnan()]
    return codes[(rows[..., None] / scales[..., None] - codes).abs().argmin(-1)] * scales


def numbers_of(weight: EightBitWeight) -> Tensor:
    """Return a weight's numbers, float64, from its bytes."""
    return e4m3()[weight.values.view(torch.uint8).long()] * weight.scales.double().t()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Return channels of very different magnitude, so that a scale at the wrong place is a large error."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, shape[0])[torch.randperm(shape[0], generator=generator)]
    return torch.randn(shape, generator=generator) * sizes[:, None]


def test_numbers_are_the_nearest_of_each_channels_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_mm, "ROWS_AT_ONCE", 10)
    weight = drawn(48, 80).bfloat16()
    weight[5] = 0
    found = EightBitWeight.of(weight)
    assert (found.values.shape, found.scales.shape) == ((48, 80), (1, 48))
    exact, numbers = weight.double(), numbers_of(found)
    torch.testing.assert_close(found.scales[0].double()[:5], exact.abs().amax(-1)[:5] / 448, rtol=1e-6, atol=0)
    assert not numbers[5].any()
    kept = torch.arange(48) != 5
    # A quotient next to the middle of two codes may go to either: compare distances.
    nearest = (rounded(exact[kept]) - exact[kept]).abs()
    more = (numbers - exact)[kept].abs() - nearest
    assert bool((more.abs() <= 1e-6 * exact[kept].abs().amax(-1, keepdim=True)).all())
    torch.testing.assert_close(found.dequantized(torch.float64), numbers, rtol=1e-6, atol=0)


def results(compute: Callable[[Tensor], Tensor], rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.clone().requires_grad_(True)
    output = compute(rows)
    (output * factors.to(output)).sum().backward()
    assert rows.grad is not None
    return output.detach(), rows.grad


def test_without_a_gpu_products_are_those_of_the_dequantized_weight() -> None:
    weight = EightBitWeight.of(drawn(48, 80))
    rows, factors = torch.randn(3, 2, 80, dtype=torch.float64), torch.randn(3, 2, 48, dtype=torch.float64)
    found = results(lambda each: eight_bit_linear(each, weight), rows, factors)
    expected = rows @ numbers_of(weight).t(), factors @ numbers_of(weight)
    for mine, exact in zip(found, expected, strict=True):
        # Numbers and scales are multiplied in fp32.
        assert float((mine - exact).norm()) <= 1e-6 * float(exact.norm())


@pytest.fixture
def as_if_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Take the path of the 8-bit products, with stand-ins in float64 for the kernel and for torch._scaled_mm, whose own
    meta kernel checks the arguments. Return a list that gets use_fast_accum of each product.
    """
    fast: list[object] = []

    def quantize_rows(rows: Tensor, columns: Tensor | None, offsets: None) -> tuple[Tensor, Tensor]:
        assert offsets is None and rows.is_contiguous() and rows.dtype is torch.bfloat16
        exact = rows.double() * (columns.double() if columns is not None else 1.0)
        scales = exact.abs().amax(-1) / 448
        return (exact / scales[:, None]).float().to(torch.float8_e4m3fn), scales.float()

    original = torch._scaled_mm

    def scaled_mm(left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor, **words: object) -> Tensor:
        # A copy to another device would lose the strides, which are to be checked.
        shapes = left.to("meta"), right.t().to("meta").t(), left_scales.to("meta"), right_scales.to("meta")
        fast.append(words["use_fast_accum"])
        assert left_scales.is_contiguous() and right_scales.is_contiguous()
        shape = original(*shapes, **words).shape  # type: ignore[arg-type]
        codes = e4m3()
        one, other = (codes[each.contiguous().view(torch.uint8).long()] for each in (left, right))
        output = (one * left_scales.double()) @ (other * right_scales.double())
        assert output.shape == shape and words["out_dtype"] is torch.bfloat16
        return output.bfloat16()

    kernels = types.ModuleType("quantized_triton")
    kernels.quantize_rows = quantize_rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mixtral_run.model.kernels.quantized.quantized_mm_triton", kernels)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(dense_mm, "in_8_bit", lambda _: True)
    return fast


def test_8_bit_products_are_those_of_rounded_rows(as_if_on_hopper: list[object]) -> None:
    weight = EightBitWeight.of(drawn(48, 80))
    rows, factors = (drawn(6, width, seed=2).view(3, 2, width).bfloat16() for width in (80, 48))
    found = results(lambda each: eight_bit_linear(each, weight), rows, factors)
    numbers = numbers_of(weight)
    scales = weight.scales.double()
    codes = numbers / scales.t()
    expected = rounded(rows.double()) @ numbers.t(), rounded(factors.double() * scales) @ codes
    plain = rows.double() @ numbers.t(), factors.double() @ numbers
    assert as_if_on_hopper == [True, True]
    for mine, exact, near in zip(found, expected, plain, strict=True):
        assert mine.dtype is torch.bfloat16 and mine.shape == exact.shape
        # In each row: a number in the middle of two codes may go to either.
        assert float(((mine.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) < 0.01
        assert 0.015 < float((mine.double() - near).norm() / near.norm()) < 0.05


def test_the_gradient_of_the_logits_is_not_summed_in_few_bits(mesh: Mesh, as_if_on_hopper: list[object]) -> None:
    model = model_of(mesh, "fp8")
    rows = torch.randn(4, 1, SMALL.hidden_size).bfloat16().requires_grad_(True)
    model.gpt.output_layer(rows)[0].sum().backward()
    model.gpt.decoder.layers[0].self_attention.linear_qkv.base_output(rows).sum().backward()
    assert as_if_on_hopper == [True, False, True, True]


def model_of(
    mesh: Mesh, attention: str, recompute: str = "none", modules: tuple[str, ...] = LORA_TARGET_MODULES
) -> MixtralModel:
    """Return a model with the same weights in either precision, and adapters whose B is not 0."""
    lora = LoraSettings(4, 8.0, 0.0, modules, 1) if modules else None
    settings = ModelSettings(torch.float32, True, lora, recompute, attention_precision=attention)
    model = build_model(SMALL, settings, mesh).train()
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    model.quantize_attention()
    return model


def layers_of(model: MixtralModel) -> dict[str, torch.nn.Module]:
    found = {
        f"{number}.{name}": getattr(layer.self_attention, name)
        for number, layer in enumerate(model.gpt.decoder.layers)
        for name in ("linear_qkv", "linear_proj")
    }
    return {**found, "output": model.gpt.output_layer}


@pytest.mark.parametrize(
    ("recompute", "modules"),
    [("none", LORA_TARGET_MODULES), ("selective", LORA_TARGET_MODULES), ("full", ("linear_proj", "linear_fc1"))],
)
def test_a_model_is_the_one_that_has_the_dequantized_weights(
    mesh: Mesh, recompute: str, modules: tuple[str, ...]
) -> None:
    """Losses, all gradients, the logits of the last token, and the base alone."""
    small, whole = model_of(mesh, "fp8", recompute, modules), model_of(mesh, "bf16", "none", modules)
    before = whole.losses(tokens := torch.arange(24).view(2, 12) * 7 % 300, tokens.roll(-1, 1)).detach()
    for one, other in zip(layers_of(small).values(), layers_of(whole).values(), strict=True):
        assert one.weight is None
        assert other.weight.shape == one.quantized.values.shape
        other.weight.data.copy_(numbers_of(one.quantized))
    found = []
    for model in (small, whole):
        losses = model.losses(tokens, tokens.roll(-1, 1))
        losses.sum().backward()
        gradients = [each.grad for _, each in sorted(model.named_parameters()) if each.requires_grad]
        with torch.no_grad():
            last = model.eval().logits(tokens, last_only=True)
            with without_adapters(model):
                found.append([losses.detach(), last, model.logits(tokens), *gradients])
    assert len(found[0]) == len(found[1]) == 3 + 2 * 2 * len(modules)
    for mine, exact in zip(*found, strict=True):
        assert mine is not None and exact is not None and exact.abs().max() > 0
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)
    # The weights were rounded, and not to other ones.
    assert 1e-3 < float((found[0][0] - before).abs().mean()) < 0.3


def test_a_checkpoint_has_the_adapters_of_a_model_in_bf16_and_no_quantized_weight(mesh: Mesh) -> None:
    keys = {precision: set(model_of(mesh, precision).gpt.sharded_state_dict()) for precision in ("bf16", "fp8")}
    assert {name for name in keys["fp8"] if is_adapter(name)} == {name for name in keys["bf16"] if is_adapter(name)}
    model = model_of(mesh, "fp8")
    kept = {name for name, each in model.gpt.sharded_state_dict().items() if hasattr(each, "global_shape")}
    missing = {name for name in keys["bf16"] if name not in kept}
    assert len(missing) == 2 * SMALL.num_layers + 1
    assert all(name.endswith(("linear_qkv.weight", "linear_proj.weight", "output_layer.weight")) for name in missing)


def test_adapters_that_start_from_the_weights_start_from_those_in_8_bit(mesh: Mesh) -> None:
    lora = LoraSettings(4, 10.0, 0.0, ("linear_qkv",), init="pissa")
    model = build_model(SMALL, ModelSettings(torch.float32, True, lora, attention_precision="fp8"), mesh)
    layer = model.gpt.decoder.layers[1].self_attention.linear_qkv
    for each in layers_of(model).values():
        torch.nn.init.normal_(each.weight, 0.0, 0.1)
    model.quantize_attention()
    start.start_from_weights(model)
    exact = torch.linalg.svd(numbers_of(layer.quantized))
    largest = exact[0][:, :4] @ torch.diag(exact[1][:4]) @ exact[2][:4]
    product = lora.scale * layer.adapter.initial_out.weight @ layer.adapter.initial_in.weight
    torch.testing.assert_close(product.double(), largest, rtol=0, atol=1e-4)


def test_gpus_without_the_products_are_refused_in_words(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtral, "capability_of", lambda _: (8, 0))
    with pytest.raises(ConfigError) as caught:
        model_of(mesh, "fp8")
    first, second = caught.value.problems
    assert (
        first.startswith("--attention-precision fp8: expected GPUs of compute capability 9.0") and "found 8.0" in first
    )
    assert "--dtype bf16" in second
    model_of(mesh, "bf16")


def test_a_reference_of_align_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Its log-probabilities are those of other numbers."""
    config = AlignConfig(load=Path("base"), save=Path("adapter"), data_path=("pairs.jsonl",), method="dpo")
    samples: Any = types.SimpleNamespace(folder=tmp_path, arrays=range(4))
    names = []
    for precision in ("bf16", "fp8", "bf16"):
        model: Any = types.SimpleNamespace(settings=ModelSettings(torch.bfloat16, True, attention_precision=precision))
        names.append(ReferenceFile.of(config, "f", model, samples).path.name)
    assert names[0] == names[2] != names[1]

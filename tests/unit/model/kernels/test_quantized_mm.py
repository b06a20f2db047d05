"""Experts in 8 bit: quantization error, products compared with a reference, training compared with full precision."""

import dataclasses
import sys
import types
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.model import experts
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.dispatch.permute import Permutation
from mixtral_run.model.kernels.grouped_mm import grouped_linear
from mixtral_run.model.kernels.quantized import quantized_mm
from mixtral_run.model.kernels.quantized.formats import FP8, LARGEST
from mixtral_run.model.kernels.quantized.quantized_mm import (
    KEPT_AS,
    dequantize,
    quantize,
    quantize_to,
    quantized_layout,
    quantized_linear,
    quantized_with_inner,
)
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.recompute.recipe import Recipe
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.samples import batches
from mixtral_run.train.steps.step import train_step, trainable
from mixtral_run.trial.sizes import INSTRUCTIONS
from tests.multiprocess.conftest import SMALL
from tests.support.examples import examples_of
from tests.support.quantized_cache import KEPT_NUMBERS, checksums_of, weight_to_keep
from tests.support.references.experts_reference import ROUTINGS
from tests.support.samples import samples_of


@pytest.mark.parametrize("size", [1e-6, 0.02, 300.0])
def test_each_number_is_within_half_a_step(size: float) -> None:
    weight = torch.randn(4, 64, 256) * size * torch.logspace(-2, 2, 64)[:, None]
    values, scales = quantize(weight)
    assert (values.dtype, values.shape, scales.shape) == (FP8, weight.shape, weight.shape[:-1])
    # Three mantissa bits: an error of half of 2⁻³ of the number, or, below 2⁻⁶, half of the smallest step.
    error = (dequantize(values, scales, torch.float32) - weight).abs()
    assert bool((error <= weight.abs() * 2**-4 * 1.001 + scales[..., None] * 2**-10 * 1.001).all())
    # Normal numbers: a uniform error within half a step has a root mean square of 2.6 % of the numbers.
    assert float(error.norm() / weight.norm()) < 0.03


def test_the_largest_number_is_exact_and_zeros_stay_zero() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.25], [-7.0, 7.0, 0.0]])
    values, scales = quantize(weight)
    torch.testing.assert_close(dequantize(values, scales, torch.float32), weight, rtol=1e-6, atol=0)


def written_out(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    starts = [0, *offsets.tolist()]
    return torch.cat([rows[start : starts[e + 1]] @ weight[e].t() for e, start in enumerate(starts[:-1])])


def results(compute: object, rows: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.clone().requires_grad_(True)
    output = compute(rows, *rest)  # type: ignore[operator]
    (output * torch.linspace(-1, 1, output.numel(), dtype=rows.dtype).view_as(output)).sum().backward()
    assert rows.grad is not None
    return output.detach(), rows.grad


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_plain_product_is_that_of_the_dequantized_weight(routing: tuple[int, ...]) -> None:
    torch.manual_seed(sum(routing))
    rows, weight = torch.randn(sum(routing), 48).double(), torch.randn(4, 32, 48)
    offsets = torch.tensor(routing).cumsum(0).int()
    values, scales = quantize(weight)
    mine = results(quantized_linear, rows, values, scales, offsets)
    expected = results(written_out, rows, dequantize(values, scales, torch.float64), offsets)
    exact = results(written_out, rows, weight.double(), offsets)
    for found, same, near in zip(mine, expected, exact, strict=True):
        torch.testing.assert_close(found, same, rtol=1e-10, atol=1e-10)
        if near.numel():
            assert 0 < float((found - near).norm() / near.norm()) < 0.04


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_quantized_with_inner_is_both_products(routing: tuple[int, ...], recomputed: bool) -> None:
    torch.manual_seed(sum(routing))
    drawn, weight, linear_in = torch.randn(sum(routing), 48), torch.randn(4, 32, 48), torch.randn(4, 3, 48)
    offsets = torch.tensor(routing).cumsum(0).int()
    values, scales = quantize(weight)

    def apart(rows: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        return quantized_linear(rows, values, scales, offsets), grouped_linear(rows, half, offsets)

    def together(rows: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        recipe = Recipe.of(lambda doubled: doubled / 2, rows * 2) if recomputed else None
        return quantized_with_inner(rows, values, scales, offsets, half, recipe)

    found = []
    for compute in (apart, together):
        rows, half = drawn.clone().requires_grad_(True), linear_in.clone().requires_grad_(True)
        output, inner = compute(rows, half)
        (output.sin().sum() + inner.cos().sum()).backward()
        assert rows.grad is not None and half.grad is not None
        found.append((output.detach(), inner.detach(), rows.grad, half.grad))
    for expected, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert not found[0][3].isnan().any()


def stand_in_product(
    left: Tensor,
    right: Tensor,
    left_scales: Tensor,
    right_scales: Tensor,
    *,
    offs: Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """Compute torch._scaled_grouped_mm on the CPU in fp32; torch's meta kernel checks the arguments."""
    shapes = [each.to("meta") for each in (left, right, left_scales, right_scales, offs)]
    # A copy to another device would lose the strides, which are to be checked.
    shapes[1] = right.transpose(1, 2).to("meta").transpose(1, 2)
    expected = torch._scaled_grouped_mm(*shapes[:4], offs=shapes[4], out_dtype=out_dtype)
    matrices = (right.float() * right_scales[:, None]).transpose(1, 2)
    output = written_out(left.float() * left_scales[:, None], matrices, offs)
    assert output.shape == expected.shape
    return output.to(out_dtype)


@pytest.fixture
def as_if_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of the 8-bit products with kernels written in torch."""

    def quantize_rows(
        rows: Tensor, columns: Tensor | None, offsets: Tensor, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = rows if source is None else rows[source]
        if columns is not None:
            owner = torch.searchsorted(offsets, torch.arange(len(rows), dtype=torch.int32), right=True)
            rows = rows.float() * columns[owner]
        return quantize(rows)

    def quantize_with(rows: Tensor, columns: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        owner = torch.searchsorted(offsets, torch.arange(len(rows), dtype=torch.int32), right=True)
        scaled = rows.float() * columns[owner] / scales[:, None]
        return scaled.clamp(-LARGEST, LARGEST).to(FP8)

    kernels = types.ModuleType("quantized_triton")
    kernels.quantize_rows = quantize_rows  # type: ignore[attr-defined]
    kernels.quantize_with = quantize_with  # type: ignore[attr-defined]
    kernels.fits_tiles = lambda _: False  # type: ignore[attr-defined]
    kernels.tiled_product = None  # type: ignore[attr-defined]
    kernels.transposed = lambda values: values.transpose(1, 2).contiguous()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mixtral_run.model.kernels.quantized.quantized_mm_triton", kernels)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", _checked(torch._scaled_grouped_mm))
    monkeypatch.setattr(quantized_mm, "has_scaled_product", lambda *_: True)
    monkeypatch.setattr(experts, "has_scaled_product", lambda *_: True)
    monkeypatch.setattr(quantized_mm, "own_product_runs", lambda _: False)


def test_an_own_product_that_does_not_run_is_reported_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    assert not quantized_mm.own_product_runs.__wrapped__(torch.device("cpu"))
    assert "transposed weights, slower" in caplog.text and "NVRTC" in caplog.text


def _checked(original: object) -> object:
    def product(left: Tensor, *rest: Tensor, **words: object) -> Tensor:
        if left.is_meta:
            return original(left, *rest, **words)  # type: ignore[operator,no-any-return]
        return stand_in_product(left, *rest, **words)  # type: ignore[arg-type]

    return product


@pytest.mark.parametrize("routing", [each for each in ROUTINGS if sum(each)])
def test_8_bit_products_are_close(as_if_on_hopper: None, routing: tuple[int, ...]) -> None:
    torch.manual_seed(sum(routing))
    rows = torch.randn(sum(routing), 64).bfloat16()
    # Channels of very different magnitude: the gradient has to include their scales.
    weight = torch.randn(4, 96, 64) * torch.logspace(-3, 1, 96)[torch.randperm(96), None]
    offsets = torch.tensor(routing).cumsum(0).int()
    values, scales = quantize(weight)
    mine = results(quantized_linear, rows, values, scales, offsets)
    expected = results(written_out, rows.double(), dequantize(values, scales, torch.float64), offsets)
    for found, near in zip(mine, expected, strict=True):
        assert found.dtype is torch.bfloat16
        # Errors of the activations' own rounding to 8 bit.
        assert float((found.double() - near).norm() / near.norm()) < 0.06


def model_in(mesh: Mesh, base_precision: str, architecture: MixtralArchitecture = SMALL) -> MixtralModel:
    """Return a model with the same base weights in either precision."""
    lora = LoraSettings(4, 8.0, 0.0, LORA_TARGET_MODULES, 1)
    model = build_model(architecture, ModelSettings(torch.float32, True, lora, "none", base_precision), mesh).train()

    def fill() -> None:
        for name, weight in model.named_parameters():
            if not (weight.requires_grad or weight.is_meta or "norm" in name):
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weight.data.normal_(0.0, 0.1, generator=generator)

    fill()
    model.quantize_experts(fill)
    return model


def test_scales_that_swiglu_knows_change_no_gradient(
    as_if_on_hopper: None, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are near the gradients of dequantized experts, and each other's bit for bit."""
    layer = model_in(mesh, "fp8").experts[0]
    generator = torch.Generator().manual_seed(1)
    tokens, weights = (torch.randn(60, 64, generator=generator).bfloat16() for _ in range(2))
    probs = torch.rand(60, generator=generator)
    offsets = torch.tensor([9, 9, 30, 31, 40, 48, 59, 60], dtype=torch.int32)
    halves = list(layer.parameters())
    for half in halves:
        half.data.normal_(0.0, 0.1, generator=generator)

    def gradients() -> list[Tensor]:
        rows, factors = tokens.clone().requires_grad_(True), probs.clone().requires_grad_(True)
        output = layer.adapted_forward(rows, Permutation(offsets), None, factors)
        return list(torch.autograd.grad((output * weights).sum(), [rows, factors, *halves]))

    known = gradients()
    given = []
    monkeypatch.setattr(experts.ExpertLinear, "factors", lambda *_: given.append(None))
    unknown = gradients()
    assert given == [None]
    monkeypatch.setattr(quantized_mm, "has_scaled_product", lambda *_: False)
    for mine, other, near in zip(known, unknown, gradients(), strict=True):
        assert torch.equal(mine, other)
        assert float((mine - near).norm()) < 0.1 * float(near.norm())


def test_training_is_close_to_a_full_precision_base(mesh: Mesh, tiny_tokenizer: Any) -> None:
    architecture = dataclasses.replace(SMALL, vocab_size=1024)
    samples = PackedSamples(samples_of(examples_of(INSTRUCTIONS), tiny_tokenizer, 128))
    runs = {}
    for precision in ("bf16", "fp8", "nf4"):
        model = model_in(mesh, precision, architecture)
        optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
        stream = batches(samples, seed=1, micro_batch_size=4, global_batch_size=4)
        runs[precision] = [train_step(model, optimizer, next(stream), 1.0).loss for _ in range(40)]
    assert runs["bf16"] != runs["fp8"] != runs["nf4"]
    # The loss falls: a model that learns nothing would be close as well.
    assert runs["bf16"][-1] < runs["bf16"][0] - 0.3
    for precision in ("fp8", "nf4"):
        assert runs[precision] == pytest.approx(runs["bf16"], rel=0.01)


def test_full_precision_weights_are_freed(mesh: Mesh) -> None:
    layer = model_in(mesh, "fp8").experts[0]
    for linear in (layer.linear_fc1, layer.linear_fc2):
        assert linear.weight is None
        assert linear.values.dtype is FP8 and linear.scales.shape == linear.values.shape[:-1]
    assert not any("weight" in name for name in layer.sharded_state_dict() if "adapter" not in name)


@pytest.mark.parametrize(("precision", "size"), [("fp8", (96, 64)), ("nf4", (96, 64)), ("nf4", (64, 96))])
def test_quantized_layout_describes_the_result(precision: str, size: tuple[int, int]) -> None:
    made = quantize_to(torch.randn(size), precision)
    assert quantized_layout(*size, precision) == tuple((each.dtype, tuple(each.shape)) for each in made)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_stored_numbers_do_not_change(precision: str) -> None:
    """Fail if the numbers differ from those in existing files: then KEPT_AS has to be raised."""
    found = checksums_of(quantize_to(weight_to_keep(), precision))
    assert (KEPT_AS[precision], found) == KEPT_NUMBERS[precision]

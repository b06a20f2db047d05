"""Attention and the output layer in 8 bit on the GPU: products compared with float64, and captured steps of a model."""

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.kernels.quantized.dense_mm import EightBitWeight, eight_bit_linear
from mixtral_run.model.kernels.quantized.quantized_mm import quantize
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.data.samples import MockSamples, batches
from mixtral_run.train.steps.cuda_graph import CapturedBackward
from mixtral_run.train.steps.step import StepResult, train_step, trainable
from tests.gpu.kernels.test_kernels import small_model

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="products in 8 bit are Hopper's",
)


def channels(outputs: int, inputs: int) -> torch.Tensor:
    """Return rows of very different magnitude, so that a scale at the wrong place is a large error."""
    return torch.randn(outputs, inputs, device="cuda") * torch.logspace(-3, 0, outputs, device="cuda")[:, None]


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [1, 17, 512, 2048])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (32000, 4096), (1024, 528)])
def test_products_are_those_of_rows_in_8_bit(tokens: int, shape: tuple[int, int]) -> None:
    weight = channels(*shape).bfloat16()
    small = EightBitWeight.of(weight)
    rows, gradient = (torch.randn(tokens, width, device="cuda").bfloat16() for width in reversed(shape))
    rows.requires_grad_(True)
    found = eight_bit_linear(rows, small)
    found.backward(gradient)
    numbers, scales = small.dequantized(torch.float64), small.scales.double()
    assert apart(numbers, weight.double()) < 0.03
    values, factors = quantize(rows.detach())
    back, back_factors = quantize(gradient.float() * small.scales)
    expected = (values.double() * factors.double()[:, None]) @ numbers.t()
    # The codes of the weight without its scales, which the gradient has taken.
    expected_back = (back.double() * back_factors.double()[:, None]) @ (numbers / scales.t())
    assert rows.grad is not None and found.dtype is rows.grad.dtype is torch.bfloat16
    # bf16, and the short sums of Hopper's 8-bit products.
    errors = apart(found, expected), apart(rows.grad, expected_back)
    print(f"{tokens} x {shape}: {errors[0]:.2%} forward, {errors[1]:.2%} backward")
    assert max(errors) < 0.012
    assert apart(found, rows.double() @ numbers.t()) < 0.04
    assert apart(rows.grad, gradient.double() @ numbers) < 0.04


def test_the_gradient_of_a_loss_over_the_vocabulary() -> None:
    """One large number a row and 31,999 small ones, which sums in few bits would lose."""
    weight = (torch.randn(32000, 4096, device="cuda") * 0.02 + torch.randn(4096, device="cuda") * 0.01).bfloat16()
    logits = (torch.randn(256, 32000, device="cuda") * 2).double()
    gradient = torch.softmax(logits, -1)
    gradient[torch.arange(256), torch.multinomial(gradient, 1)[:, 0]] -= 1
    gradient = (gradient / 256).bfloat16()
    small, short = (EightBitWeight.of(weight, uneven_gradients=each) for each in (True, False))
    exact = gradient.double() @ small.dequantized(torch.float64)
    errors = [apart(each.gradient(gradient), exact) for each in (small, short)]
    print(f"gradient of the logits: {errors[0]:.2%}, with sums in few bits {errors[1]:.2%}")
    assert errors[0] < 0.02


@pytest.mark.parametrize("base_precision", ["bf16", "fp8"])
def test_captured_steps_are_the_eager_ones_and_near_those_in_bf16(base_precision: str) -> None:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    cases = (("bf16", "none", False), ("fp8", "none", False), ("fp8", "none", True), ("fp8", "selective", True))
    steps: list[list[StepResult]] = []
    with open_mesh(config) as mesh:
        for attention, recompute, captured in (*cases, ("fp8", "full", True)):
            model = small_model(mesh, recompute, base_precision, attention_precision=attention)
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            stream = batches(MockSamples(1024, 128, 1), seed=1, micro_batch_size=2, global_batch_size=4)
            backward = CapturedBackward(model) if captured else None
            steps.append([train_step(model, optimizer, next(stream), 1.0, backward) for _ in range(6)])
    whole, eager, *others = steps
    assert whole[0].loss != eager[0].loss
    assert abs(eager[0].loss - eager[-1].loss) > 0.01
    for other in (whole, *others):
        assert other[0].loss == pytest.approx(eager[0].loss, rel=1e-2 if other is whole else 1e-3)
        assert other[0].grad_norm == pytest.approx(eager[0].grad_norm, rel=0.05 if other is whole else 2e-3)
        # AdamW's first step goes by the gradients' signs alone, also of those that a rounding turns.
        assert [step.loss for step in other] == pytest.approx([step.loss for step in eager], rel=1e-2)

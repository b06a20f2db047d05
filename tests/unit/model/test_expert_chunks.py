"""Experts in chunks of the tokens: losses and gradients stay, and the activations of one chunk exist at a time."""

import dataclasses
from typing import Any

import pytest
import torch

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.experts import Experts
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh, seed_everything
from mixtral_run.model.routing.expert_chunks import chunk_sizes
from tests.multiprocess.conftest import SMALL
from tests.support.live_tensors import LiveBytes

BATCH, SEQUENCE = 2, 24


def model_of(
    mesh: Mesh,
    chunks: int,
    recompute: str = "full",
    dropout: float = 0.0,
    modules: tuple[str, ...] = LORA_TARGET_MODULES,
    architecture: MixtralArchitecture = SMALL,
    base_precision: str = "bf16",
) -> MixtralModel:
    lora = LoraSettings(4, 8.0, dropout, modules, 1)
    settings = ModelSettings(torch.float32, True, lora, recompute, base_precision, expert_chunks=chunks)
    model = build_model(architecture, settings, mesh).train()
    generator = torch.Generator().manual_seed(5)

    def fill() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and ".linear_in" not in name and not parameter.is_meta:
                    parameter.normal_(0.0, 0.1, generator=generator)

    fill()
    model.quantize_experts(fill)
    return model


def losses_of(model: MixtralModel, sequence: int = SEQUENCE) -> torch.Tensor:
    tokens = torch.randint(
        0, model.architecture.vocab_size, (BATCH, sequence + 1), generator=torch.Generator().manual_seed(9)
    )
    seed_everything(3, 0)
    return model.losses(tokens[:, :-1], tokens[:, 1:])


def gradients_of(model: MixtralModel) -> dict[str, torch.Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(
    ("recompute", "chunks", "modules", "base_precision"),
    [
        ("full", 2, LORA_TARGET_MODULES, "bf16"),
        ("full", 5, LORA_TARGET_MODULES, "nf4"),
        ("offload", 48, LORA_TARGET_MODULES, "bf16"),
        ("offload", 1000, LORA_TARGET_MODULES, "fp8"),
        ("full", 7, ("linear_qkv", "linear_proj"), "bf16"),
        ("full", 3, ("linear_fc2",), "bf16"),
        ("none", 3, LORA_TARGET_MODULES, "bf16"),
        ("selective", 3, LORA_TARGET_MODULES, "bf16"),
    ],
)
def test_losses_and_gradients_stay(
    mesh: Mesh, recompute: str, chunks: int, modules: tuple[str, ...], base_precision: str
) -> None:
    """Equal up to the order of sums: each product has other rows, and the adapters' gradients add up over chunks."""
    results = []
    for count in (1, chunks):
        model = model_of(mesh, count, recompute, modules=modules, base_precision=base_precision)
        losses = losses_of(model)
        losses.mean().backward()
        results.append((losses.detach(), gradients_of(model)))
    (losses, gradients), (chunked_losses, chunked_gradients) = results
    torch.testing.assert_close(chunked_losses, losses, rtol=2e-6, atol=2e-6)
    assert gradients.keys() == chunked_gradients.keys() and gradients
    for name, gradient in gradients.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_the_backward_pass_draws_the_dropout_of_the_forward_pass(mesh: Mesh) -> None:
    """Against chunks whose activations autograd keeps: `none` draws in the same order."""
    results = []
    for recompute in ("none", "full", "offload"):
        model = model_of(mesh, 3, recompute, dropout=0.3)
        losses = losses_of(model)
        losses.mean().backward()
        results.append((losses.detach(), gradients_of(model)))
    for losses, gradients in results[1:]:
        assert torch.equal(losses, results[0][0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-5, atol=1e-8)


def test_the_routers_are_balanced_over_all_tokens(mesh: Mesh) -> None:
    """Each router's gradient has the loss of its balance, whose f and P are means over all tokens of all layers."""
    found = []
    for chunks, coefficient in ((1, 0.0), (1, 5.0), (4, 5.0)):
        model = model_of(mesh, chunks)
        model.balance_routers(coefficient)
        balance = model.router_loss
        assert balance is not None
        routers = [layer.mlp.router.weight.requires_grad_() for layer in model.gpt.decoder.layers]
        with balance.counting(torch.full((BATCH, SEQUENCE), 1 / (BATCH * SEQUENCE))):
            losses = losses_of(model)
        losses.mean().backward()
        found.append((balance.value(), [weight.grad for weight in routers]))
    (_, without), (value, whole), (chunked_value, chunked) = found
    torch.testing.assert_close(chunked_value, value)
    for plain, expected, gradient in zip(without, whole, chunked, strict=True):
        assert plain is not None and expected is not None and gradient is not None
        largest = float(expected.abs().max())
        assert float((expected - plain).abs().max()) > 0.05 * largest
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * largest)


def test_each_chunk_is_computed_twice(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass and for its own backward pass, but not when the layer runs again, whose output is unread."""
    seen: list[int] = []
    compute = Experts.adapted_forward

    def noted(self: Experts, tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append(tokens.shape[0])
        return compute(self, tokens, *rest, **named)

    monkeypatch.setattr(Experts, "adapted_forward", noted)
    model = model_of(mesh, 5)
    losses = losses_of(model)
    chunks = [10, 10, 10, 9, 9]
    assert seen == chunks * SMALL.num_layers
    losses.mean().backward()
    assert sorted(seen) == sorted(2 * chunks * SMALL.num_layers)
    seen.clear()
    with torch.no_grad():
        losses_of(model.eval())
    assert seen == chunks * SMALL.num_layers


def test_sizes_add_up() -> None:
    assert chunk_sizes(10, 4) == [3, 3, 2, 2]
    assert chunk_sizes(2, 8) == [1, 1]
    assert chunk_sizes(0, 8) == [0]


LONG = dataclasses.replace(
    SMALL, num_layers=2, hidden_size=32, ffn_hidden_size=448, num_attention_heads=2, num_query_groups=1, kv_channels=16
)


def peak_of(mesh: Mesh, chunks: int, sequence: int) -> int:
    """Return the most bytes of tensors that existed at once in a forward and backward pass."""
    model = model_of(mesh, chunks, architecture=LONG)
    losses_of(model, 8).mean().backward()  # gradients exist
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients_of(model).values()]) as live:
        losses_of(model, sequence).mean().backward()
    assert live.held < live.peak / 10, "what is freed must be noticed"
    return live.peak


def test_the_activations_of_one_chunk_exist_at_a_time(mesh: Mesh) -> None:
    """By hand: two rows a token, fp32; whole, gate and up, their gradients, the activation and its gradient exist."""
    sequence = 128
    whole, chunked = (peak_of(mesh, count, sequence) for count in (1, 8))
    columns = 2 * BATCH * sequence * LONG.ffn_hidden_size * 4
    assert whole > 6 * columns
    assert whole - chunked > 6 * columns * 7 / 8
    # Less than gate and up of all tokens alone.
    assert chunked < 2 * columns

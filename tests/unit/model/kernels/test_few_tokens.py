"""The references of the kernels for few tokens, and when the model's layers call these kernels."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.inference.decode import Decoding, FixedShapeDecoding
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.dispatch.permute import sort_by_expert
from mixtral_run.model.kernels.decoding import few_tokens
from mixtral_run.model.kernels.quantized.quantized_mm import dequantize
from mixtral_run.model.kernels.requirements import KernelSet
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.model.routing.moe import choose
from mixtral_run.model.without_adapters import without_adapters
from tests.multiprocess.conftest import SMALL

ONE_TOKEN = "mixtral_run.model.kernels.decoding.one_token_triton"
ARCHITECTURE = dataclasses.replace(SMALL, ffn_hidden_size=128, moe_router_topk=8)
"""All experts are chosen: near a tie rounding would decide which."""


def test_the_reference_of_one_tokens_experts() -> None:
    token, first, second = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 6), (3, 10, 6), (3, 6, 5)))
    probs = torch.tensor([[0.7, 0.3]])
    expected = torch.zeros(6, dtype=torch.float64)
    for expert, prob in ((2, probs[0, 0].double()), (0, probs[0, 1].double())):
        hidden = first[expert] @ token[0]
        expected += prob * (second[expert] @ (silu(hidden[:5]) * hidden[5:]))
    found = few_tokens.plain_outputs_of_one(token, torch.tensor([[2, 0]]), probs, first, second)
    torch.testing.assert_close(found, expected[None])


def stand_in(calls: Counter[str]) -> SimpleNamespace:
    """STAND-IN for the Triton kernels, which tests/gpu/kernels compares with the same references."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    def sorted_rows(tokens: torch.Tensor, experts: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        order, inverse, offsets, source = sort_by_expert(experts.flatten(), count, experts.shape[1])
        return tokens[source], order, inverse, offsets

    functions: dict[str, Callable[..., Any]] = {
        "route": lambda tokens, weight, topk: choose(linear(tokens.float(), weight.float()), topk),
        "sorted_rows": sorted_rows,
        "outputs_of_one": few_tokens.plain_outputs_of_one,
        "product_of_one": few_tokens.plain_product_of_one,
    }
    return SimpleNamespace(**{name: counted(name, function) for name, function in functions.items()})


ONE = {"route": 4, "outputs_of_one": 2, "product_of_one": 4}
ONE_QUANTIZED = {"route": 4, "quantized": 2, "product_of_one": 4}
PROMPT = {"sorted_rows": 2}
"""Of the pass over the prompt, unless both of the experts' matrices have adapters."""
ADAPTED: dict[str, LoraSettings | None] = {
    "": None,
    "each": LoraSettings(4, 8.0, 0.0, LORA_TARGET_MODULES),
    "shared": LoraSettings(4, 8.0, 0.0, LORA_TARGET_MODULES, shared=True),
    "some": LoraSettings(4, 8.0, 0.0, ("linear_fc2", "linear_qkv")),
}


@pytest.mark.parametrize(
    ("precision", "adapted", "rows", "expected"),
    [
        ("bf16", "", 1, ONE | PROMPT),
        ("bf16", "each", 1, ONE),
        ("bf16", "shared", 1, ONE),
        ("fp8", "", 1, ONE_QUANTIZED | PROMPT),
        ("fp8", "some", 1, ONE_QUANTIZED | PROMPT),
        ("nf4", "each", 1, ONE_QUANTIZED),
        ("bf16", "", 3, {"route": 4, "sorted_rows": 4}),
        ("bf16", "", 33, {}),
    ],
)
def test_passes_of_few_tokens_take_their_kernels(
    precision: str, adapted: str, rows: int, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass over prompts of 9 tokens, and one over one more token each, in two layers."""
    calls: Counter[str] = Counter()
    monkeypatch.setitem(sys.modules, f"{few_tokens.__name__}_triton", stand_in(calls))
    monkeypatch.setitem(sys.modules, ONE_TOKEN, quantized_stand_in(calls))
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")
    tokens, padding = torch.randint(1, SMALL.vocab_size, (rows, 10)), torch.zeros(rows, dtype=torch.int64)
    with open_mesh(config) as mesh, torch.inference_mode():
        settings = ModelSettings(torch.bfloat16, False, ADAPTED[adapted], base_precision=precision)
        model = build_model(ARCHITECTURE, settings, mesh).eval()
        model.quantize_experts(lambda: fill(model))
        fill(model)
        model.refresh_adapters()
        found = []
        for kind, kernels in ((Decoding, None), (FixedShapeDecoding, KernelSet.HOPPER)):
            monkeypatch.setattr(few_tokens, "kernels_of", lambda _, kernels=kernels: kernels)
            passes = kind(model, padding, 10)
            found.append(torch.stack([passes(tokens[:, :9]), passes(tokens[:, 9:])]).float())
        if adapted:
            with without_adapters(model):
                monkeypatch.setattr(few_tokens, "kernels_of", lambda _: None)
                passes = Decoding(model, padding, 10)
                alone = torch.stack([passes(tokens[:, :9]), passes(tokens[:, 9:])]).float()
            assert float((found[1] - alone).norm()) > 0.05 * float(alone.norm())
    assert {name: count for name, count in calls.items() if count} == expected
    assert float((found[0] - found[1]).norm()) < 2e-2 * float(found[0].norm())


def fill(model: MixtralModel) -> None:
    for index, weight in enumerate(model.parameters()):
        if not weight.is_meta:
            weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(index))


def quantized_stand_in(calls: Counter[str]) -> SimpleNamespace:
    """STAND-IN for the Triton kernels of one token with quantized experts, by the same references."""

    def call(token: torch.Tensor, experts: torch.Tensor, probs: torch.Tensor, *others: Any) -> torch.Tensor:
        calls["quantized"] += 1
        *stored, adapters = others
        whole = [dequantize(*both, token.dtype) for both in stored]
        return few_tokens.plain_outputs_of_one(token, experts, probs, *whole, adapters)

    return SimpleNamespace(outputs_of_one=call)

"""Layers that run again except attention: the same bit for bit, one attention a layer and pass, and its result kept."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.experts import ExpertLinear
from mixtral_run.model.layer import recompute_of
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.recompute import kept_attention
from mixtral_run.model.recompute.kept_attention import KeptAttention
from mixtral_run.train import load_model
from mixtral_run.train.data.samples import GlobalBatch
from mixtral_run.train.steps.cuda_graph import execution_of
from mixtral_run.weights.manifest.describe import BaseDescription
from tests.multiprocess.conftest import SMALL
from tests.support.live_tensors import LiveTensors
from tests.unit.model.attention.test_packed_attention import micro_batches
from tests.unit.model.recompute.test_offload import trained
from tests.unit.model.recompute.test_recompute import BATCH, SEQUENCE, loss_of, model_of


class AttentionCalls(TorchDispatchMode):
    """Counts the operators of attention that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name():
            self.names["backward" if "backward" in func.name() else "forward"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_that_of_full_recomputation_bit_by_bit(mesh: Mesh, dropout: float, packed: bool) -> None:
    row, alone = micro_batches()
    # Several micro batches a step, of several sizes.
    micros = (row, row) if packed else tuple(alone)
    batch = GlobalBatch(micros, 20, len(micros))
    results, tensors = trained(model_of(mesh, "except-attention", dropout), batch)
    expected_results, expected = trained(model_of(mesh, "full", dropout), batch)
    assert results == expected_results and results[0].loss != results[-1].loss
    assert len(tensors) == len(expected) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, expected, strict=True))


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("full", 2), ("except-attention", 1)])
def test_attention_runs_once_a_layer(mesh: Mesh, recompute: str, times: int) -> None:
    model = model_of(mesh, recompute)
    with AttentionCalls() as calls:
        loss_of(model).backward()
    assert calls.names == {"forward": times * SMALL.num_layers, "backward": SMALL.num_layers}


def test_besides_the_layers_inputs_only_results_of_attention_stay(mesh: Mesh) -> None:
    found = {}
    for mode in ("full", "except-attention"):
        model = model_of(mesh, mode)
        with LiveTensors() as live:
            loss = loss_of(model)
            found[mode] = Counter(each.rsplit(" (", 1)[1] for each in live.besides(model.parameters()))
        del loss
    heads = SMALL.num_attention_heads
    result, log_sum_exp = (BATCH, heads, SEQUENCE, SMALL.kv_channels), (BATCH, heads, SEQUENCE)
    more = found["except-attention"] - found["full"]
    assert more == {str(each)[1:]: SMALL.num_layers for each in (result, log_sum_exp)}
    assert not found["full"] - found["except-attention"]


def test_nothing_stays_after_the_backward_pass(mesh: Mesh) -> None:
    model = model_of(mesh, "except-attention")
    loss_of(model).backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    with LiveTensors() as live:
        loss_of(model).backward()
        assert live.besides([*model.parameters(), *gradients]) == []


def test_all_operators_of_a_layer_are_kept_in_their_order() -> None:
    """Rows that are split over ranks take two, each with its own queries and keys."""
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        first = scaled_dot_product_attention(query[:, :, :3], key[:, :, :3], value[:, :, :3], is_causal=True)
        return torch.cat((first, scaled_dot_product_attention(query[:, :, 3:], key, value)), dim=2)

    def gradients(**given: Any) -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (query, key, value)]
        kept = given.get("kept")
        result = kept(attend, *leaves) if kept is not None else attend(*leaves)
        return result, *torch.autograd.grad(result.square().sum(), leaves)

    expected = gradients()
    kept = KeptAttention()
    with torch.no_grad():
        assert torch.equal(kept(attend, query, key, value), expected[0])
    assert [tuple(each.shape) for each in kept.tensors()] == 2 * [(2, 4, 3, 8), (2, 4, 3)]
    assert not any(each.requires_grad for each in kept.tensors())
    with AttentionCalls() as calls:
        found = gradients(kept=kept)
    assert calls.names == {"backward": 2} and kept.tensors() == []
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    # Another backward pass through the same graph finds none, and computes them.
    with AttentionCalls() as calls:
        found = gradients(kept=kept)
    assert calls.names == {"forward": 2, "backward": 2}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_torchs_compiler_is_not_imported_for_it() -> None:
    """torch wraps a mode's method so that the first call imports the compiler, unless the mode says otherwise."""
    wrapped = [hasattr(mode.__torch_dispatch__, "__wrapped__") for mode in (kept_attention._Keep, AttentionCalls)]
    assert wrapped == [False, True]
    assert not hasattr(kept_attention._Return.__torch_dispatch__, "__wrapped__")


@contextmanager
def second_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield the numbers of rows of the products of linear_fc2, forward."""
    rows: list[int] = []
    product = ExpertLinear.product

    def noted(self: ExpertLinear, given: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if given.shape[-1] == SMALL.ffn_hidden_size:
            rows.append(given.shape[0])
        return product(self, given, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(ExpertLinear, "product", noted)
        yield rows


@pytest.mark.parametrize("recompute", ["none", "full", "except-attention", "offload"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_nobody_computes_an_output_that_is_not_read(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, recompute: str, chunks: int
) -> None:
    """The layer that runs again, or a chunk of its tokens that does, has the experts' first linear layer only."""
    model = model_of(mesh, recompute)
    model.settings = dataclasses.replace(model.settings, expert_chunks=chunks)
    with second_products(monkeypatch) as rows:
        loss_of(model).backward()
    assert sum(rows) == SMALL.num_layers * BATCH * SEQUENCE * SMALL.moe_router_topk


@pytest.mark.parametrize("recompute", ["full", "except-attention", "offload"])
def test_the_first_layers_run_again_and_the_others_are_selective(mesh: Mesh, recompute: str) -> None:
    four = dataclasses.replace(SMALL, num_layers=4)
    results = {}
    for layers in (None, 3, 1):
        model = model_of(mesh, "none", architecture=four)
        model.recompute(recompute, layers)
        again = 4 if layers is None else layers
        expected = [recompute] * again + ["selective"] * (4 - again)
        assert [each.recompute for each in model.gpt.decoder.layers] == expected
        loss = loss_of(model)
        with AttentionCalls() as calls:
            loss.backward()
        assert calls.names["forward"] == (0 if recompute == "except-attention" else again)
        results[layers] = loss.detach(), [each.grad for each in model.parameters() if each.grad is not None]
    loss, gradients = results[None]
    for other, others in (results[3], results[1]):
        assert torch.equal(other, loss) and len(others) == len(gradients) > 0
        for mine, theirs in zip(others, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6 * float(theirs.abs().max()))


def test_which_layers_run_again() -> None:
    numbers = range(1, 5)
    assert [recompute_of(each, "full", None) for each in numbers] == ["full"] * 4
    assert [recompute_of(each, "full", 2) for each in numbers] == ["full", "full", "selective", "selective"]
    assert [recompute_of(each, "except-attention", 9) for each in numbers] == ["except-attention"] * 4
    assert [recompute_of(each, "none", 2) for each in numbers] == ["none"] * 4


@pytest.mark.parametrize("config_class", [FinetuneConfig, PretrainConfig])
def test_a_run_builds_its_model_so(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, config_class: type[FinetuneConfig] | type[PretrainConfig]
) -> None:
    monkeypatch.setattr(load_model, "load_base", lambda *_: None)
    monkeypatch.setattr(load_model, "start_from_weights", lambda _: None)
    base = BaseDescription(Path("base"), SMALL, "float32", "")
    given: dict[str, Any] = {"load": Path("base"), "save": Path("adapter"), "mock_data": True}
    config = config_class(**given, recompute="except-attention", recompute_layers=1)
    lora = LoraSettings(4, 8.0, 0.0, ("linear_qkv",), 1) if config_class is FinetuneConfig else None
    model = load_model.load_for_training(config, base, mesh, lora, recompute=config.recomputation)
    assert [each.recompute for each in model.gpt.decoder.layers] == ["except-attention", "selective"]


def test_the_pass_is_captured_where_full_is(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixtralModel, "is_capturable", True)
    captured = {
        (mode, dropout): execution_of(model_of(mesh, mode, dropout), 16).captured
        for mode in ("none", "full", "except-attention", "offload")
        for dropout in (0.0, 0.3)
    }
    assert [key for key, value in captured.items() if value] == [
        ("none", 0.0), ("none", 0.3), ("full", 0.0), ("except-attention", 0.0),
    ]  # fmt: skip

"""The adapters' 16-bit copies follow every kind of write to an adapter, and are made only after one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.model.adapters import cast_adapters
from mixtral_run.model.adapters.cast_adapters import cast_copy, note_change, refresh
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.train.checkpoints.checkpoint import load_adapter
from mixtral_run.train.preferences.prepare import _with_adapter
from mixtral_run.train.steps.adapter_adamw import AdapterAdamW
from mixtral_run.train.steps.cuda_graph import CapturedBackward
from mixtral_run.train.steps.eager_optimizer import SGD, AdamW
from mixtral_run.train.steps.step import trainable
from mixtral_run.train.validation import evaluating
from mixtral_run.weights.manifest.describe import describe_adapter
from tests.multiprocess.conftest import SMALL
from tests.support.adapters import save_adapter

BF16 = torch.bfloat16
TOKENS = torch.tensor([[1, 5, 9, 200, 31, 7]])


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of copies of each update."""
    counts: list[int] = []
    copy = torch._foreach_copy_

    def counting(to: list[Tensor], source: list[Tensor]) -> None:
        counts.append(len(to))
        copy(to, source)

    monkeypatch.setattr(torch, "_foreach_copy_", counting)
    return counts


def step_of(kind: Any, parameter: Parameter, **settings: Any) -> None:
    parameter.grad = torch.ones_like(parameter)
    kind([parameter], lr=0.5, **settings).step()


@torch.no_grad()
def rows(parameter: Parameter) -> None:
    parameter[0].copy_(torch.tensor([9.0, 8.0]))


@torch.no_grad()
def whole(parameter: Parameter) -> None:
    parameter.copy_(torch.full((2, 2), 7.0))


@torch.inference_mode()
def without_gradients(parameter: Parameter) -> None:
    parameter.mul_(3.0)


def past_torch(parameter: Parameter) -> None:
    parameter.detach().numpy()[1, 1] = 50.0
    note_change([parameter])


def past_torch_in_inference_mode(parameter: Parameter) -> None:
    with torch.inference_mode():
        past_torch(parameter)


def other_memory(parameter: Parameter) -> None:
    parameter.data = torch.full((2, 2), 4.0)


WRITERS: dict[str, Callable[[Parameter], None]] = {
    "AdamW, fused": partial(step_of, AdamW, fused=True),
    "AdamW, not fused": partial(step_of, AdamW),
    "SGD": partial(step_of, SGD),
    "SGD, fused": partial(step_of, SGD, fused=True),
    "the adapters' AdamW": partial(step_of, AdapterAdamW, fused=True),
    "rows": rows,
    "whole": whole,
    "in inference mode": without_gradients,
    "past torch": past_torch,
    "past torch in inference mode": past_torch_in_inference_mode,
    "other memory": other_memory,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_copy_follows_each_kind_of_write(writer: str, copied: list[int]) -> None:
    still, changed = Parameter(torch.ones(3)), Parameter(torch.ones(2, 2))
    refresh([still, changed], BF16)
    memory = cast_copy(changed, BF16).data_ptr()
    for _ in range(2):
        refresh([still, changed], BF16)
    WRITERS[writer](changed)
    assert not torch.equal(changed, torch.ones(2, 2))
    refresh([still, changed], BF16)
    assert copied == [2, 1]
    copy = cast_copy(changed, BF16)
    # CUDA graphs read the copy from the same memory.
    assert copy.data_ptr() == memory and torch.equal(copy, changed.detach().bfloat16())


def test_a_copy_that_was_made_in_inference_mode_can_be_trained_with(copied: list[int]) -> None:
    parameter = Parameter(torch.ones(2, 2))
    with torch.inference_mode():
        refresh([parameter], BF16)
    hidden = torch.ones(2, dtype=BF16, requires_grad=True)
    (cast_copy(parameter, BF16) @ hidden).sum().backward()
    assert hidden.grad is not None and copied == [1]


def test_parameters_whose_changes_nobody_counts_are_always_copied(copied: list[int]) -> None:
    with torch.inference_mode():
        parameter = Parameter(torch.ones(2), requires_grad=False)
        for value in (2.0, 3.0, 3.0):
            parameter.fill_(value)
            note_change([parameter])
            refresh([parameter], BF16)
            assert cast_copy(parameter, BF16).tolist() == [value] * 2
    assert copied == [1, 1, 1]


def model_of(mesh: Mesh, seed: int) -> MixtralModel:
    lora = LoraSettings(4, 8.0, 0.0, LORA_TARGET_MODULES, 1)
    model = build_model(SMALL, ModelSettings(BF16, False, lora), mesh).train()
    base, own = torch.Generator().manual_seed(5), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.1, generator=own if parameter.requires_grad else base)
    return model


def logits_of(model: MixtralModel) -> Tensor:
    with evaluating(model):
        return model.logits(TOKENS)


def test_passes_have_the_adapter_that_was_loaded_or_set_back(mesh: Mesh, tmp_path: Path, copied: list[int]) -> None:
    """A checkpoint is read into the memory of the parameters; align's reference is another adapter, or none."""
    model, other = model_of(mesh, 1), model_of(mesh, 2)
    own, others = logits_of(model), logits_of(other)
    assert (own - others).abs().max() > 0.05
    description = {
        "dtype": "bfloat16", "base": {"fingerprint": "0-0", "path": None}, "training": {}, "data_sha256": None,
        "lora": {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target_modules": LORA_TARGET_MODULES},
    }  # fmt: skip
    save_adapter(other, AdamW(trainable(other)), tmp_path, 1, description)
    adapter = describe_adapter(tmp_path)
    with _with_adapter(model, adapter):
        assert torch.equal(logits_of(model), others)
    assert torch.equal(logits_of(model), own)
    with without_adapters(model):
        assert not torch.equal(logits_of(model), own)
    assert torch.equal(logits_of(model), own)
    load_adapter(model, adapter)
    assert torch.equal(logits_of(model), others)
    count = len(trainable(model))
    assert copied == [count] * 5
    with torch.inference_mode():
        assert torch.equal(model.logits(TOKENS), others)
    assert copied == [count] * 5


def test_a_replay_finds_the_copies_of_the_present_adapters(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is a STAND-IN, whose replay reads a copy as the captured pass would."""
    model = model_of(mesh, 1)
    (first, *_), seen = trainable(model), []

    class Graph:
        def replay(self) -> None:
            seen.append(cast_copy(first, BF16).clone())
            assert cast_adapters._is_fresh(first)

    backward = CapturedBackward(model)
    monkeypatch.setattr(backward, "_inputs_of", lambda *_: [])
    monkeypatch.setattr(backward, "_capture", lambda adds: backward._graphs.update({adds: (Graph(), torch.ones(1))}))
    backward._gradients = [None] * len(trainable(model))
    for value in (1.0, 2.0):
        with torch.no_grad():
            first.fill_(value)
        backward(None, 1)  # type: ignore[arg-type]
        assert seen[-1].unique().tolist() == [value]

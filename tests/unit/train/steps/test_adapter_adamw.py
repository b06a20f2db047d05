"""The optimizer's kernel, or its stand-in that reads the same tables, next to torch.optim.AdamW."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from mixtral_run.model.adapters import cast_adapters
from mixtral_run.model.kernels.optimizer.adamw import corrections_of, num_corrections
from mixtral_run.model.kernels.optimizer.layout import CHUNK
from mixtral_run.train.steps import adapter_adamw
from mixtral_run.train.steps.adapter_adamw import AdapterAdamW, apply_gradients
from mixtral_run.train.steps.eager_optimizer import AdamW
from tests.support.references import adamw_tables

KERNEL = "mixtral_run.model.kernels.optimizer.adamw_triton"
SHAPES = ((3, 4), (1,), (CHUNK + 5,), (2, 16, 8), (2, CHUNK))
"""Sizes that are no multiples of a block or of a chunk, one element, and a multiple."""
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.999), "fused": True}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let CPU tensors be updated by the kernel in Triton's interpreter, or by its stand-in. Return a list of calls."""
    calls: list[int] = []
    if importlib.util.find_spec("triton") is None or not os.environ.get("TRITON_INTERPRET"):
        monkeypatch.setitem(sys.modules, KERNEL, adamw_tables)
    module = importlib.import_module(KERNEL)
    kernel = module.update

    def update(*tables: Any) -> None:
        calls.append(len(tables[1]))
        kernel(*tables)

    monkeypatch.setattr(module, "update", update)
    monkeypatch.setattr(adapter_adamw, "kernels_of", lambda _: True)
    return calls


def parameters(seed: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def groups_of(tensors: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": tensors[:2]},
        {"params": tensors[2:4], "lr": 3e-2, "weight_decay": 0.0},
        {"params": tensors[4:], "betas": (0.8, 0.99), "eps": 1e-3},
    ]


def give(tensors: list[torch.nn.Parameter], number: int, scale: float = 1.0, skipped: int | None = None) -> None:
    """Give gradients that are the same for the same number. skipped: index of a tensor that gets none."""
    generator = torch.Generator().manual_seed(100 + number)
    for index, each in enumerate(tensors):
        gradient = torch.randn(each.shape, generator=generator) * 10.0 ** (-index)
        each.grad = (gradient * scale).to(each.dtype) if index != skipped else None


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def states(optimizer: torch.optim.Optimizer, tensors: list[torch.nn.Parameter]) -> list[Tensor]:
    found = [each.detach() for each in tensors]
    for each in tensors:
        state = optimizer.state.get(each, {})
        found += [state[name] for name in ("step", "exp_avg", "exp_avg_sq") if name in state]
    return found


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, right in zip(found, expected, strict=True):
        # beta2 in fp32 is 1.3e-8 from 0.999, a share of 1.3e-5 of what is left of 1, and so in steps of up to 0.06.
        torch.testing.assert_close(mine.double(), right.double(), rtol=3e-5, atol=6e-6)


def assert_are_casts(tensors: list[torch.nn.Parameter]) -> None:
    # Triton's interpreter cuts the bits off; its compiler and torch round.
    largest = 2**-7 if os.environ.get("TRITON_INTERPRET") else 0.0
    for each in tensors:
        torch.testing.assert_close(
            cast_adapters.cast_copy(each, torch.bfloat16), each.bfloat16(), rtol=largest, atol=0.0
        )


@pytest.mark.parametrize("factor", [None, 0.25])
def test_steps_and_states_are_those_of_torch_in_fp32_and_fp64(used: list[int], factor: float | None) -> None:
    """Three groups; a tensor without a gradient in steps 2 and 3, which is not counted there; other learning rates."""
    mine, single, double = parameters(), parameters(), parameters(dtype=torch.float64)
    optimizer = AdapterAdamW(groups_of(mine), **SETTINGS)
    others = [AdamW(groups_of(each), **{**SETTINGS, "fused": False}) for each in (single, double)]
    for number in range(6):
        skipped = 1 if number in (2, 3) else None
        give(mine, number, skipped=skipped)
        for each in (optimizer, *others):
            each.param_groups[1]["lr"] = 1e-2 * (number + 1)
        apply_gradients(optimizer, torch.tensor(factor) if factor is not None else None)
        for tensors, other in zip((single, double), others, strict=True):
            give(tensors, number, factor or 1.0, skipped)
            other.step()
    assert used == [5, 5, 4, 4, 5, 5]
    for tensors, other in zip((single, double), others, strict=True):
        assert_near(states(optimizer, mine), states(other, tensors))
    assert float(optimizer.state[mine[1]]["step"]) == 4.0
    assert not torch.equal(mine[0], parameters()[0])


def test_gradients_stay_as_they_are_and_a_factor_counts_once(used: list[int]) -> None:
    mine = parameters()
    optimizer = AdapterAdamW(mine, **SETTINGS)
    give(mine, 0)
    before = [gradient_of(each).clone() for each in mine]
    apply_gradients(optimizer, torch.tensor(0.5))
    assert optimizer.gradient_factor is None
    assert all(torch.equal(gradient_of(each), gradient) for each, gradient in zip(mine, before, strict=True))
    assert used == [5]


def test_a_gradient_or_a_factor_that_is_not_a_number_spoils_what_it_spoils_in_torch(used: list[int]) -> None:
    mine, single = parameters(), parameters()
    found = []
    for kind, tensors in ((AdapterAdamW, mine), (AdamW, single)):
        optimizer = kind(groups_of(tensors), **SETTINGS)
        for number, factor in enumerate((1.0, 0.5, float("nan"))):
            give(tensors, number)
            gradients = [gradient_of(each) for each in tensors]
            gradients[0][1, 2], gradients[3][0, 0, 0] = torch.nan, torch.inf
            apply_gradients(optimizer, torch.tensor(factor))
            found.append([each.isfinite().logical_not() for each in states(optimizer, tensors)])
    for mine_are, torchs_are in zip(found[:3], found[3:], strict=True):
        assert all(torch.equal(mine, right) for mine, right in zip(mine_are, torchs_are, strict=True))
    assert found[0][0].sum() == 1 and found[2][0].all() and len(used) == 3


def test_states_go_from_torchs_optimizer_to_ours_and_back(used: list[int]) -> None:
    mine, single = parameters(), parameters()
    optimizer, other = AdapterAdamW(groups_of(mine), **SETTINGS), AdamW(groups_of(single), **SETTINGS)
    for number in range(6):
        give(mine, number)
        give(single, number)
        optimizer.step()
        other.step()
        if number % 2:
            first, second = optimizer.state_dict(), other.state_dict()
            assert first["state"].keys() == second["state"].keys()
            assert first["param_groups"] == second["param_groups"]
            assert all(first["state"][key].keys() == second["state"][key].keys() for key in first["state"])
            optimizer.load_state_dict(second)
            other.load_state_dict(first)
    assert_near(states(optimizer, mine), states(other, single))
    assert len(used) == 6 and float(optimizer.state[mine[0]]["step"]) == 6.0


def test_tensors_that_moved_are_found_again(used: list[int]) -> None:
    """Other memory of a parameter, of its gradient, of a moment; a step that was set. The old memory is not used."""
    mine, single = parameters(), parameters()
    optimizer, other = AdapterAdamW(mine, **SETTINGS), AdamW(single, **SETTINGS)
    for number in range(5):
        give(mine, number)
        give(single, number)
        old = mine[0].data
        if number == 1:
            mine[0].data = old.clone()
            old.fill_(7.0)
        if number == 2:
            optimizer.state[mine[3]]["exp_avg"] = optimizer.state[mine[3]]["exp_avg"].clone()
        if number == 3:
            for kind, tensors in ((optimizer, mine), (other, single)):
                kind.state[tensors[4]]["step"].fill_(1000.0)
        optimizer.step()
        other.step()
        assert number != 1 or bool((old == 7.0).all())
    assert_near(states(optimizer, mine), states(other, single))
    assert len(used) == 5


def test_gradients_are_not_held(used: list[int]) -> None:
    """An eager pass frees them before it makes new ones."""
    mine = parameters()
    optimizer = AdapterAdamW(mine, **SETTINGS)
    for number in range(2):
        give(mine, number)
        held = [ref(gradient_of(each)) for each in mine]
        optimizer.step()
        for each in mine:
            each.grad = None
        assert [each() for each in held] == [None] * len(mine)
    assert used == [5, 5]


@pytest.mark.parametrize("how", ["dtype", "strided", "not fused", "amsgrad", "maximize", "tensor rate"])
def test_what_the_kernel_does_not_know_is_left_to_torch(used: list[int], how: str) -> None:
    found = []
    settings = {**SETTINGS, **{name: how == name for name in ("amsgrad", "maximize")}, "fused": how != "not fused"}
    if how == "tensor rate":
        settings["lr"] = torch.tensor(1e-2)
    for kind in (AdapterAdamW, AdamW):
        tensors = parameters(dtype=torch.float64 if how == "dtype" else torch.float32)
        if how == "strided":
            tensors[3] = torch.nn.Parameter(torch.ones(4, 4).t()[:, :3])
        optimizer = kind(tensors, **settings)
        give(tensors, 0)
        apply_gradients(optimizer, torch.tensor(0.5))
        found.append(states(optimizer, tensors))
    assert used == [] and all(torch.equal(mine, right) for mine, right in zip(*found, strict=True))


def test_copies_are_fresh_after_a_step_and_only_then(used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = parameters()
    with_copy = mine[1:]
    cast_adapters.refresh(with_copy, torch.bfloat16)
    optimizer = AdapterAdamW(mine, **SETTINGS)
    give(mine, 0)
    versions = [each._version for each in mine]
    optimizer.step()
    assert all(each._version > before for each, before in zip(mine, versions, strict=True))
    copied: list[int] = []
    copy = torch._foreach_copy_

    def counting(to: list[Tensor], source: list[Tensor]) -> None:
        copied.append(len(to))
        copy(to, source)

    monkeypatch.setattr(torch, "_foreach_copy_", counting)
    cast_adapters.refresh(with_copy, torch.bfloat16)
    assert copied == [] and used == [5]
    assert_are_casts(with_copy)
    # A tensor that got no step keeps its copy; one that is written otherwise does not.
    give(mine, 1, skipped=2)
    with torch.no_grad():
        mine[2].add_(1.0)
    optimizer.step()
    cast_adapters.refresh(with_copy, torch.bfloat16)
    assert copied == [1]
    assert_are_casts(with_copy)


def test_corrections_are_those_of_every_step() -> None:
    betas = (0.9, 0.999)
    found = corrections_of(betas, torch.device("cpu"))
    assert len(found) == num_corrections(*betas) == 18013
    for step in (1, 2, 10, 1000, len(found)):
        expected = torch.tensor([1 - 0.9**step, (1 - 0.999**step) ** 0.5], dtype=torch.float64)
        torch.testing.assert_close(found[step - 1].double(), expected, rtol=4e-5, atol=0.0)
    assert found[-1].tolist() == [1.0, 1.0]
    assert num_corrections(0.0, 0.0) == 1 and num_corrections(0.9, 1.0) > 2**20

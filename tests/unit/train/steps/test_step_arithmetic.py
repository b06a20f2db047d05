"""The arithmetic of a step in numbers that are worked out in the comments; other ranks are played by a stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch
from mixtral_run.train.steps import step as module
from mixtral_run.train.steps.step import (
    EagerBackward,
    StepResult,
    adapter_optimizer,
    gradients_of,
    losses_of,
    optimizer_step,
    sum_gradients,
    train_step,
)

CPU = torch.device("cpu")


class Group:
    """STAND-IN for a process group of two ranks. The other rank adds `others`, one number for each all-reduce."""

    def __init__(self, others: list[float] | None = None) -> None:
        self.others = others
        self.num_calls = 0

    def size(self) -> int:
        return 1 if self.others is None else 2


@pytest.fixture(autouse=True)
def all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(tensor: Tensor, group: Group) -> None:
        assert group.others is not None
        tensor += group.others[group.num_calls]
        group.num_calls += 1

    monkeypatch.setattr(torch.distributed, "all_reduce", add)


def mesh_of(**groups: Group) -> Any:
    names = ("tensor_group", "expert_group", "data_group", "expert_data_group")
    return SimpleNamespace(device=CPU, **{name: groups.get(name, Group()) for name in names})


class Line(torch.nn.Module):
    """STAND-IN for a model: the loss of a token is `weight` times the token plus the label."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.mesh = mesh
        self.router_counts = self.router_loss = None
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))
        self.unused = torch.nn.Parameter(torch.tensor([5.0]))

    def losses(self, tokens: Tensor, labels: Tensor, **_: object) -> Tensor:
        return self.weight * tokens + labels


def micro(tokens: list[float], labels: list[float], mask: list[float]) -> MicroBatch:
    rows = [torch.tensor([each]) for each in (tokens, labels, mask)]
    return MicroBatch(*rows, position_ids=torch.arange(len(tokens))[None])


# Over the mask: tokens 1 + 3 + 4 = 8, labels 10 + 30 + 40 = 80, 3 tokens on this rank. The whole batch has 5.
BATCH = GlobalBatch(
    (micro([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [1.0, 0.0, 1.0]), micro([4.0, 9.0], [40.0, 90.0], [1.0, 0.0])), 5, 2
)


def stepped(model: Line, clip_grad: float, rate: float = 0.5) -> StepResult:
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    return optimizer_step(model, optimizer, clip_grad)(BATCH, rate)  # type: ignore[arg-type]


def test_loss_and_gradient_are_divided_by_the_tokens_of_all_ranks() -> None:
    model = Line(mesh_of())
    result = stepped(model, clip_grad=0.0)
    assert result == StepResult(loss=pytest.approx((2 * 8 + 80) / 5), grad_norm=pytest.approx(8 / 5), num_tokens=5)
    assert model.weight.item() == pytest.approx(2.0 - 0.5 * 8 / 5)
    # No token reached it: its gradient is zero, and it stays.
    assert model.unused.grad is not None and model.unused.item() == 5.0


def test_the_other_ranks_gradients_and_losses_are_added_and_not_averaged() -> None:
    """The other rank has the two missing tokens: gradients 3.0, then 0.0 for `unused`; loss 7.0."""
    group = Group([3.0, 7.0])
    model = Line(mesh_of(data_group=group))
    model.unused.requires_grad_(False)
    optimizer = torch.optim.SGD([model.weight], lr=1.0)
    result = train_step(model, optimizer, BATCH, 0.0)  # type: ignore[arg-type]
    assert group.num_calls == 2
    assert result.loss == pytest.approx(96 / 5 + 7.0)
    assert result.grad_norm == pytest.approx(8 / 5 + 3.0)
    assert model.weight.item() == pytest.approx(2.0 - (8 / 5 + 3.0))


@pytest.mark.parametrize(("clip_grad", "step"), [(0.8, 0.8), (1.6, 1.6), (3.2, 1.6), (0.0, 1.6)])
def test_gradients_are_clipped_to_the_limit_and_never_made_larger(clip_grad: float, step: float) -> None:
    """The norm is 1.6, which is reported as it was before."""
    model = Line(mesh_of())
    result = stepped(model, clip_grad, rate=1.0)
    assert result.grad_norm == pytest.approx(1.6)
    assert model.weight.item() == pytest.approx(2.0 - step, rel=1e-5)


def test_gradients_of_an_earlier_step_are_not_added() -> None:
    model = Line(mesh_of())
    model.weight.grad = torch.tensor([100.0])
    assert stepped(model, 0.0).grad_norm == pytest.approx(1.6)
    assert stepped(model, 0.0).grad_norm == pytest.approx(1.6)


def test_a_gradient_of_nearly_zero_is_not_turned_round_by_clipping() -> None:
    """The token is 1e-8 and one of 5: the norm is 2e-9, far below the 1e-6 that the division is protected with."""
    model = Line(mesh_of())
    model.weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = GlobalBatch((micro([1e-8], [0.0], [1.0]),), 5, 1)
    train_step(model, optimizer, batch, clip_grad=1.0)  # type: ignore[arg-type]
    assert model.weight.item() == pytest.approx(-2e-9)


@pytest.mark.parametrize("asks", [False, True])
def test_the_host_waits_for_the_loss_behind_the_optimizer_unless_a_step_may_be_refused(
    monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    """It waits once, for numbers that are copied before the optimizer begins."""
    happened: list[str] = []

    def begin_reading(found: Tensor) -> Callable[[], list[float]]:
        happened.append("copied")

        def read() -> list[float]:
            happened.append("read")
            return found.tolist()

        return read

    monkeypatch.setattr(module, "begin_reading", begin_reading)
    model = Line(mesh_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: happened.append("stepped"))
    result = train_step(model, optimizer, BATCH, 0.0, refuses=(lambda *_: False) if asks else None)  # type: ignore[arg-type]
    assert happened == (["copied", "read", "stepped"] if asks else ["copied", "stepped", "read"])
    assert result.taken and result.loss == pytest.approx((2 * 8 + 80) / 5)


def test_the_routers_get_the_part_of_the_loss_that_a_token_has() -> None:
    """A fifth for each of the three tokens. Each of the two passes adds 0.25; choices are counted from begin to end."""
    model = Line(mesh_of())
    model.router_loss, model.router_counts = MagicMock(), MagicMock()
    model.router_loss.value.return_value = torch.tensor(0.25)
    assert stepped(model, 0.0).loss == pytest.approx(96 / 5 + 2 * 0.25)
    weights = [call.args[0].tolist() for call in model.router_loss.counting.call_args_list]
    assert weights == [[pytest.approx([0.2, 0.0, 0.2])], [pytest.approx([0.2, 0.0])]]
    names = [name for name, *_ in model.router_counts.method_calls]
    assert names == ["begin_step", "counting", "counting", "end_step"]


def test_losses_are_summed_under_the_mask() -> None:
    """2 · 1 + 10 and 2 · 3 + 30; the token between them does not count."""
    assert losses_of(Line(mesh_of()), BATCH.micro_batches[0]).item() == 48.0  # type: ignore[arg-type]


def test_a_loss_without_figures_is_one_number() -> None:
    model = Line(mesh_of())
    assert gradients_of(BATCH, [model.weight], EagerBackward(model)).tolist() == [pytest.approx(96 / 5)]  # type: ignore[arg-type]


def parameter(value: float, **marks: bool) -> torch.nn.Parameter:
    found = torch.nn.Parameter(torch.zeros(2))
    found.grad = torch.tensor([value, 0.0])
    mark(found, **marks)
    return found


def test_each_gradient_is_summed_over_the_ranks_that_share_its_parameter() -> None:
    expert, partial = parameter(1.0, expert=True), parameter(2.0, partial=True)
    split, plain = parameter(3.0, split=True), parameter(4.0)
    groups = {
        "expert_data_group": Group([10.0]),
        "tensor_group": Group([100.0]),
        "data_group": Group([1000.0]),
        "expert_group": Group([1e9]),
    }
    sum_gradients([expert, partial, split, plain], mesh_of(**groups))
    assert expert.grad.tolist() == [11.0, 10.0]
    assert partial.grad.tolist() == [1102.0, 1100.0]  # over TP first, then over the replicas
    assert split.grad.tolist() == [1003.0, 1000.0]
    assert plain.grad.tolist() == [1004.0, 1000.0]
    assert [groups[name].num_calls for name in ("expert_data_group", "tensor_group", "data_group")] == [1, 1, 1]
    assert groups["expert_group"].num_calls == 0


def test_the_norm_counts_each_parameter_once() -> None:
    """Squares: experts 9 here and 16 on the other rank, split 144 and 25, replicated 6 + 0 on every rank alike."""
    mesh = mesh_of(expert_group=Group([16.0]), tensor_group=Group([25.0]), data_group=Group([1e9]))
    parameters = [parameter(3.0, expert=True), parameter(12.0, split=True), parameter(math.sqrt(6.0), partial=True)]
    norm = module.gradient_norm(parameters, mesh)
    assert norm.item() == pytest.approx(math.sqrt(9 + 16 + 144 + 25 + 6))


def test_what_all_experts_share_is_summed_over_all_ranks_alone() -> None:
    """The ranks of one set of experts and the replicas of it are all ranks together."""
    shared = parameter(1.0, shared=True)
    groups = {"expert_group": Group([10.0]), "expert_data_group": Group([100.0]), "data_group": Group([1e9])}
    sum_gradients([shared], mesh_of(**groups))
    assert shared.grad.tolist() == [111.0, 110.0]
    assert groups["data_group"].num_calls == 0


def test_a_bucket_has_gradients_of_one_dtype_and_256_mib() -> None:
    parameters = [parameter(float(number)) for number in range(4)]
    for each in parameters[2:]:
        each.data, each.grad = each.data.bfloat16(), each.grad.bfloat16()
    group = Group([10.0, 100.0])
    sum_gradients(parameters, mesh_of(data_group=group))
    assert [each.grad[0].item() for each in parameters] == [10.0, 11.0, 102.0, 103.0]
    assert module.BUCKET_BYTES == 268_435_456


@pytest.mark.parametrize("limit", [1, 8, 16, 24, 10**9])
def test_buckets_hold_every_gradient_once_and_in_order(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Each gradient has two fp32 elements, 8 bytes; a bucket takes gradients until it has reached the limit."""
    monkeypatch.setattr(module, "BUCKET_BYTES", limit)
    parameters = [parameter(float(number)) for number in range(5)]
    calls = {1: 5, 8: 5, 16: 3, 24: 2, 10**9: 1}[limit]
    group = Group([10.0 ** (2 + number) for number in range(calls)])
    sum_gradients(parameters, mesh_of(data_group=group))
    assert group.num_calls == calls
    per_bucket = {1: 1, 8: 1, 16: 2, 24: 3, 10**9: 5}[limit]
    assert [each.grad.tolist() for each in parameters] == [
        [number + 10.0 ** (2 + number // per_bucket), 10.0 ** (2 + number // per_bucket)] for number in range(5)
    ]


def test_lora_plus_gives_b_its_own_learning_rate_and_norms_do_not_decay() -> None:
    """AdamW's first step is the learning rate times the gradient's sign: A moves by 0.25, B by 16 times that.

    Before it, 0.1 of the learning rate decays: 0.025 of A and 0.4 of B. No token reaches the norm, which stays.
    """
    model = Line(mesh_of())
    adapter = torch.nn.Module()
    adapter.linear_in = torch.nn.Parameter(torch.tensor([1.0]))
    adapter.linear_out = torch.nn.Parameter(torch.tensor([1.0]))
    model.adapter, model.layernorm = adapter, torch.nn.LayerNorm(1, bias=False)
    model.losses = lambda tokens, labels, **_: adapter.linear_in * tokens + adapter.linear_out * tokens + labels
    settings = {"load": Path("a"), "save": Path("b"), "mock_data": True, "lr": 1.0, "weight_decay": 0.1}
    config = FinetuneConfig(**settings, lora_plus_ratio=16.0)
    optimizer = adapter_optimizer(model, config)
    step = optimizer_step(model, optimizer, clip_grad=0.0)
    step(GlobalBatch((micro([3.0], [1.0], [1.0]),), 1, 1), 0.25)
    assert adapter.linear_in.item() == pytest.approx(1.0 - 0.025 - 0.25, abs=1e-6)
    assert adapter.linear_out.item() == pytest.approx(1.0 - 0.4 - 4.0, abs=1e-6)
    assert model.layernorm.weight.item() == 1.0
    assert (optimizer.defaults["betas"], optimizer.defaults["fused"]) == ((0.9, 0.999), True)
    assert len(adapter_optimizer(model, FinetuneConfig(**settings)).param_groups) == 2

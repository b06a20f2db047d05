"""Parts of the planner's memory in numbers that are worked out here, for hidden sizes of 10 and 100 and two experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.planner import full_memory, full_plan, memory_model
from mixtral_run.planner.full_memory import full_memory as memory_of
from mixtral_run.planner.workload import GIB, Layout, Workload

LARGEST = 2 * 14336 * 4096
"""Weights of linear_fc1 of one expert of Mixtral 8x7B, which each of 8 GPUs holds with EP8."""


@pytest.mark.parametrize(
    ("gpus", "offload", "times"),
    [
        (8, False, 4 + 2),  # nothing is summed: the slice in fp32, which is the whole, and the new weights
        (8, True, 16 + 2),  # with its state of 12 bytes
        (16, False, 6),  # 4 of the sum and 2 of the slice; the update takes 2 + 2
        (16, True, 8 + 2),
        (32, False, 5),
        (32, True, 4 + 2),
    ],
)
def test_the_update_of_the_largest_weight(gpus: int, offload: bool, times: float) -> None:
    found = full_memory._update_bytes(Workload(gpus=gpus), Layout(1, 8, "full"), offload=offload)
    assert found == pytest.approx(times * LARGEST)
    half = full_memory._update_bytes(Workload(gpus=gpus // 2), Layout(1, 4, "full"), offload=offload)
    assert half == pytest.approx(2 * times * LARGEST)


def test_another_group_of_processes_and_recomputed_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = SimpleNamespace(weights=1.0, activations=10.0, buffers=1e12, context=5.0)
    monkeypatch.setattr(full_memory, "memory", lambda *_: lora)
    for gpus, groups in ((8, 0), (16, 1), (32, 1)):
        found = memory_of(Workload(gpus=gpus), Layout(1, 8, "full"), offload=False, accumulates=True)
        assert found.context == 5.0 + groups * 0.9 * GIB
    for recompute, layers, times in (
        ("full", None, 1),
        ("except-attention", None, 1),
        ("offload", None, 1),
        ("none", None, 2),
        ("selective", None, 2),
        ("full", 20, 2),
    ):
        layout = Layout(1, 8, recompute, recompute_layers=layers)
        found = memory_of(Workload(), layout, offload=False, accumulates=True)
        assert (found.activations, found.buffers, found.adapters) == (10.0 * times, 2e12, 0.0)
    lora.buffers = 1.0
    found = memory_of(Workload(), Layout(1, 8, "full"), offload=False, accumulates=True)
    assert found.buffers == pytest.approx(6 * LARGEST)


@pytest.mark.parametrize(
    ("tp", "ep", "recompute", "speed"),
    [
        (1, 1, "none", 1.0),
        (1, 2, "none", 0.88),
        (1, 4, "none", 0.78),
        (1, 8, "selective", 0.78 * 0.95),
        (2, 1, "full", 0.8 * 0.73),
        (4, 1, "offload", 0.64 * 0.71),
    ],
)
def test_the_speed_of_full_fine_tuning(tp: int, ep: int, recompute: str, speed: float) -> None:
    assert full_memory._relative_speed(Workload(), Layout(tp, ep, recompute)) == pytest.approx(speed)


@pytest.mark.parametrize(
    ("batch", "micro", "tp", "size", "accumulates"),
    [(8, 1, 1, 2, False), (9, 1, 1, 2, True), (9, 1, 1, 4, False), (8, 2, 2, 2, False), (9, 2, 2, 2, True),
     (16, 2, 1, 2, False), (17, 2, 1, 2, True), (2, 2, 16, 2, False), (3, 2, 16, 2, True)],
)  # fmt: skip
def test_micro_batches_that_add_up(batch: int, micro: int, tp: int, size: int, accumulates: bool) -> None:
    """On 8 GPUs; TP16 is more than there are."""
    config: Any = SimpleNamespace(global_batch_size=batch, micro_batch_size=micro)
    found = full_plan._accumulates(config, Workload(gpus=8, weight_bytes=size), Layout(tp, 1, "none"))
    assert found is accumulates


@pytest.mark.parametrize(
    ("needs", "given", "gpus", "sizes"), [(None, 2, 6, [2, 1, 2, 3, 6]), ("a loss", 1, 6, [1]), (None, 1, 1, [1, 1])]
)
def test_sizes_of_context_parallelism(needs: str | None, given: int, gpus: int, sizes: list[int]) -> None:
    config: Any = SimpleNamespace(needs_whole_rows=needs, context_size=given)
    assert full_plan._contexts(config, Workload(gpus=gpus)) == sizes


FC1, FC2 = "linear_fc1", "linear_fc2"


@pytest.mark.parametrize(
    ("layout", "targets", "dropout", "fixed", "expected"),
    [
        # Of each row of two experts: its input 20, both outputs of fc1 400, the activation 200, its output 20.
        (Layout(1, 2, "none"), ("linear_qkv",), 0.0, False, 2 * (400 + 20)),
        (Layout(1, 2, "none"), (FC1,), 0.0, False, 2 * (20 + 400 + 20)),
        (Layout(1, 2, "none"), (FC2,), 0.0, False, 2 * (400 + 200 + 20)),
        (Layout(1, 2, "none"), (FC1, FC2), 0.0, False, 2 * (20 + 400 + 20)),
        (Layout(1, 2, "none"), (FC1, FC2), 0.0, True, 2 * (20 + 400)),
        (Layout(1, 1, "none"), (FC1, FC2), 0.0, False, 20 + 2 * 400),
        (Layout(1, 1, "selective"), (FC1, FC2), 0.0, False, 2 * 400),
        (Layout(1, 2, "selective"), (FC1, FC2), 0.0, False, 2 * (20 + 400 + 20)),
        (Layout(1, 1, "none"), (FC1,), 0.0, False, 2 * (20 + 400 + 20)),
        (Layout(1, 1, "none"), (FC1, FC2), 0.1, False, 2 * (20 + 400 + 200 + 20 + 10 + 100)),
        (Layout(1, 1, "none"), (FC1,), 0.1, False, 2 * (20 + 400 + 20 + 10)),
        (Layout(1, 1, "none"), (FC2,), 0.1, False, 2 * (400 + 200 + 20 + 100)),
        (Layout(2, 2, "none"), ("linear_qkv",), 0.0, False, 400 + 20),
    ],
)
def test_what_a_token_leaves_in_the_experts(
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    targets: tuple[str, ...],
    dropout: float,
    fixed: bool,
    expected: float,
) -> None:
    shape: Any = SimpleNamespace(hidden_size=10, ffn_hidden_size=100, moe_router_topk=2)
    dispatch = SimpleNamespace(dispatch=SimpleNamespace(has_fixed_shapes=fixed))
    monkeypatch.setattr(memory_model, "execution", lambda *_: dispatch)
    monkeypatch.setattr(memory_model, "_rows_over_mean", lambda *_: 1.0)
    monkeypatch.setattr(memory_model, "_row_bytes", lambda _, size: 2 * size)
    workload = Workload(architecture=shape, lora_target_modules=targets, lora_dropout=dropout)
    assert memory_model._experts_per_token(workload, layout) == expected

"""GPU memory as reported, and the plan next to the memory that a step really takes."""

import argparse
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.lora import build_ours
from benchmarks.modes import options, run_case
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.allocator import VARIABLES, growing_segments
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.planner.available import available_gpu
from mixtral_run.planner.workload import GIB
from mixtral_run.train.steps.step import trainable

LAYERS = 8
NEEDED_GIB = 36


def test_the_gpus_are_asked() -> None:
    found = available_gpu("auto", 1)
    assert found is not None
    assert found.total == torch.cuda.mem_get_info(0)[1]
    assert 0 < found.free <= found.total


def test_memory_serves_tensors_that_are_a_little_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, of 64, 68, … 92 MiB: plain segments are each too small for the next one, 624 MiB together."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    device = torch.device("cuda", torch.cuda.current_device())

    def reserved() -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for size in range(64, 96, 4):
            torch.empty(size, 2**20, dtype=torch.uint8, device=device)
        return (torch.cuda.memory_reserved() - before) // 2**20

    assert reserved() == 624
    with growing_segments(device):
        assert 92 <= reserved() <= 150
    torch.cuda.empty_cache()
    assert reserved() == 624


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    if torch.cuda.get_device_properties(0).total_memory < NEEDED_GIB * GIB:
        pytest.skip(f"needs {NEEDED_GIB} GiB")
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    with open_mesh(config) as mesh:
        built = build_ours(LAYERS, mesh, "none", "bf16")
        yield built, [parameter.detach().cpu() for parameter in trainable(built)]


def arguments_of(*, eager: bool = False, micro_batches: int = 1) -> argparse.Namespace:
    words = ["--steps", "2", "--micro-batches", str(micro_batches), *(["--eager"] if eager else [])]
    return options().parse_args(words)


@pytest.mark.parametrize(
    "case",
    [
        "2048x1:none",
        "2048x1:none:pack",
        "2048x1:selective",
        "2048x1:full",
        "2048x1:except-attention",
        "2048x1:except-attention:layers4",
        "512x4:none",
        "512x4:selective",
        "8192x1:offload",
    ],
)
def test_the_plan_is_within_a_tenth(model: Any, case: str) -> None:
    built, kept = model
    result = run_case(built, kept, case, arguments_of())
    assert result["planned_gib"] == pytest.approx(result["peak_gib"], rel=0.1)


def test_several_micro_batches_take_what_one_takes(model: Any) -> None:
    """They are recorded apart, in the same memory."""
    built, kept = model
    one, several = (run_case(built, kept, "2048x1:none", arguments_of(micro_batches=count)) for count in (1, 3))
    assert several["peak_gib"] == pytest.approx(one["peak_gib"], abs=0.6)


def test_offload_takes_all_inputs_but_the_last_off_the_gpu(model: Any) -> None:
    built, kept = model
    tokens = torch.randint(0, 32000, (1, 8192), device="cuda")
    held = {}
    for mode in ("full", "offload"):
        for layer in built.gpt.decoder.layers:
            layer.recompute = mode
        before = torch.cuda.memory_allocated()
        losses = built.losses(tokens, tokens)
        held[mode] = torch.cuda.memory_allocated() - before
        del losses
    assert held["full"] - held["offload"] == (LAYERS - 1) * 8192 * 4096 * 2
    arguments = arguments_of(eager=True)
    full, offload = (run_case(built, kept, f"8192x1:{mode}", arguments) for mode in ("full", "offload"))
    # Less than that in the end: then the adapters' gradients are there.
    assert offload["allocated_gib"] < full["allocated_gib"]
    assert offload["losses"][0] == full["losses"][0]
    assert offload["losses"][1] == pytest.approx(full["losses"][1], rel=1e-2)

"""Memory of full fine-tuning: by hand for Mixtral 8x7B, what fits where, and what a run gets or is refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.gpus import HOPPER
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.planner import choose, full_plan
from mixtral_run.planner.available import AvailableGpu
from mixtral_run.planner.choose import settled, training_memory_error
from mixtral_run.planner.full_memory import full_choices, full_copy_bytes, full_host_bytes, full_memory
from mixtral_run.planner.table import show_plan
from mixtral_run.planner.workload import GIB, Layout, Workload
from mixtral_run.weights.manifest.describe import BaseDescription

EXPERTS = 32 * 8 * 3 * 4096 * 14336
DENSE = 46_702_792_704 - EXPERTS
BASE = BaseDescription(Path("base"), MIXTRAL_8X7B, "bfloat16", "")


def test_the_parts_are_counted_from_the_weights() -> None:
    """TP1/EP8 on 8 GPUs: an eighth of the experts, whose state nobody shares, and all other weights."""
    held = EXPERTS / 8 + DENSE
    found = full_memory(Workload(), Layout(1, 8, "full"), offload=False, accumulates=True)
    assert (found.weights, found.gradients) == pytest.approx((2 * held, 4 * held))
    assert found.optimizer == pytest.approx(12 * (EXPERTS / 8 + DENSE / 8))
    one = full_memory(Workload(), Layout(1, 8, "full"), offload=True, accumulates=False)
    assert (one.gradients, one.optimizer) == pytest.approx((2 * held, 0))
    assert full_host_bytes(Workload(), Layout(1, 8, "full"), offload=True) == pytest.approx(12 * (EXPERTS + DENSE))
    # Two hosts share the state of every expert.
    two = full_memory(Workload(gpus=16), Layout(1, 8, "full"), offload=False, accumulates=True)
    assert two.optimizer == pytest.approx(12 * (EXPERTS / 8 / 2 + DENSE / 16))


def test_the_copy_of_a_save_has_each_weight_and_its_state_once() -> None:
    whole = EXPERTS + DENSE
    for layout in (Layout(1, 8, "full"), Layout(2, 4, "none")):
        assert full_copy_bytes(Workload(), layout) == pytest.approx(14 * whole)
    # Two hosts share the state; the first may write all weights.
    assert full_copy_bytes(Workload(gpus=16), Layout(1, 8, "full")) == pytest.approx(2 * whole + 12 * whole / 2)


@pytest.mark.parametrize(
    ("ram", "line"), [(2000, "609 GiB more for saves in the background"), (1000, "waits for each save")]
)
def test_plan_full_counts_the_copy_of_a_save(ram: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(PlanConfig(full=True, gpu="h100", seq_length=4096, host_memory=ram))
    assert line in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("gpus", "gib", "ram", "fits", "offload"),
    [
        (8, 79.1, 2000, True, True),
        (8, 79.1, 500, False, None),
        (8, 139.8, 500, True, False),
        (16, 79.1, 100, True, False),
        (4, 79.1, 100, False, None),
    ],
)
def test_what_fits(gpus: int, gib: float, ram: float, fits: bool, offload: bool | None) -> None:
    best = full_choices(Workload(gpus=gpus, seq_length=4096), gib * GIB, ram * GIB, accumulates=True)[0]
    assert best.fits == fits
    assert not fits or best.offload == offload


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(count: int, gib: float, ram: float) -> None:
        monkeypatch.setattr(choose, "available_gpu", lambda *_: AvailableGpu(gib * GIB, gib * GIB, HOPPER))
        monkeypatch.setattr(choose, "describe_base", lambda _: BASE)
        monkeypatch.setattr(choose.processes, "process_count", lambda _: count)
        monkeypatch.setattr(full_plan, "host_memory", lambda: ram * GIB)

    return pretend


def run(**settings: Any) -> PretrainConfig:
    values = {"seq_length": 4096, **settings}
    return PretrainConfig(load=Path("base"), mock_data=True, save=Path("tuned"), **values).check()


def test_a_run_gets_the_layout_that_fits(on_gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpus(8, 79.1, 1000)
    config = settled(run(offload_optimizer=True, seq_length=512))
    assert (config.layout_sizes, config.recompute) == ((1, 8), "none")
    assert training_memory_error(config, BASE, 8) is None
    several = settled(run(offload_optimizer=True, seq_length=512, global_batch_size=64))
    assert several.layout_sizes == (1, 8)
    one, more = re.findall(r"Plan: TP1/EP8, recompute none: ([0-9.]+) of 79.1 GiB a GPU", capsys.readouterr().out)
    # Several micro batches add up in fp32: two bytes more for each weight.
    assert float(more) - float(one) == pytest.approx(2 * (EXPERTS / 8 + DENSE) / GIB, abs=0.2)
    given = settled(run(offload_optimizer=True, recompute="full", tensor_model_parallel_size=4))
    assert (given.layout_sizes, given.recompute) == ((4, 8), "full")


def test_a_run_that_cannot_fit_is_refused_with_what_does(on_gpus: Any) -> None:
    on_gpus(8, 79.1, 1000)
    config = settled(run())
    error = training_memory_error(config, BASE, 8)
    assert error is not None and not config.has_layout
    assert str(error.next_command).endswith("--expert-model-parallel-size 8 --recompute none --offload-optimizer")
    on_gpus(8, 79.1, 300)
    error = training_memory_error(run(tensor_model_parallel_size=1, expert_model_parallel_size=8), BASE, 8)
    assert error is not None and "with TP1/EP8, --recompute none" in str(error.found)
    command = str(error.next_command).partition(", for more GPUs")[0]
    assert command == (
        "mixtral-run plan --full --gpus 16 --gpu-memory 79 --seq-length 4096 --micro-batch-size 1 --load base"
    )


def test_rows_are_split_where_the_run_says_so(on_gpus: Any) -> None:
    """A rank has half of the activations under CP2. The error of what does not fit names the CP that does."""
    whole, halves = (
        full_memory(Workload(seq_length=65536, context_parallel_size=cp), Layout(1, 8, "none", cp), offload=True,
                    accumulates=False)
        for cp in (1, 2)
    )  # fmt: skip
    assert halves.activations == pytest.approx(whole.activations / 2, rel=0.1)
    assert (halves.weights, halves.gradients) == (whole.weights, whole.gradients)
    on_gpus(8, 79.1, 1000)
    config = settled(run(offload_optimizer=True, seq_length=65536, context_parallel_size=8))
    assert (config.layout_sizes, config.context_size) == ((1, 8), 8)
    assert training_memory_error(config, BASE, 8) is None
    on_gpus(16, 79.1, 2000)
    error = training_memory_error(settled(run(offload_optimizer=True, seq_length=524288)), BASE, 16)
    assert error is not None and "--context-parallel-size" in str(error.next_command)


def test_plan_full_prints_the_best_first_and_refuses_settings_of_lora(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(PlanConfig(full=True, gpu="h100", seq_length=4096, host_memory=2000, json=True).check())
    best = json.loads(capsys.readouterr().out)["layouts"][0]
    assert (best["fits"], best["offload_optimizer"], best["host_gib"]) == (True, True, pytest.approx(522, abs=1))
    assert best["saved_copy_gib"] == pytest.approx(609, abs=1)
    show_plan(PlanConfig(full=True, gpu="h100", seq_length=4096, host_memory=2000))
    assert "--offload-optimizer --seq-length 4096" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="No layout of full fine-tuning fits"):
        show_plan(PlanConfig(full=True, gpu="h100", host_memory=200))
    problems = PlanConfig(
        full=True, lora_rank=4, base_precision="fp8", attention_precision="fp8", expert_chunks=2, method="dpo"
    ).problems()
    assert [each.split(":")[0] for each in problems] == [
        "--lora-rank",
        "--method",
        "--base-precision",
        "--attention-precision",
        "--expert-chunks",
    ]


@pytest.mark.parametrize(
    ("words", "larger"),
    [
        # The state of AdamW, 16 bytes a weight and more, is 696 GiB: too much for 4 × 79 GiB, with little host memory.
        ("--gpus 4 --host-memory 100 --seq-length 4096", "plan --hosts 2"),
        ("--gpus 6 --host-memory 100", "--gpus 6 --hosts"),
        ("--gpus 4 --hosts 2 --host-memory 100", "--gpus 4 --hosts 4"),
        ("--gpus 4 --gpu-memory 2 --host-memory 100", None),
    ],
)
def test_the_next_plan_runs_as_it_is_printed(words: str, larger: str | None) -> None:
    gpu = "" if "--gpu-memory" in words else " --gpu h100"
    refused = CliRunner().invoke(root, ["plan", "--full", *f"{words}{gpu}".split()])
    assert isinstance(refused.exception, ConfigError)
    command, _, others = str(refused.exception.next_command).rpartition(", which fits; or ")
    assert others == "the same command without --full, for LoRA"
    assert bool(command) == (larger is not None)
    if larger is not None:
        assert larger in command
        assert CliRunner().invoke(root, shlex.split(command)[1:]).exit_code == 0

"""Decisions of the planner for a run, on simulated GPUs."""

import dataclasses
import signal
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest

from mixtral_run.config.gpus import HOPPER
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.planner import available, choose, table
from mixtral_run.planner.available import AvailableGpu
from mixtral_run.planner.choose import memory_error, settled
from mixtral_run.planner.memory_model import CONTEXT
from mixtral_run.planner.workload import GIB
from mixtral_run.train import preflight
from mixtral_run.weights.manifest.describe import BaseDescription, describe_base

BASE = BaseDescription(Path("base"), MIXTRAL_8X7B, "bfloat16", "f")


def run(**settings: Any) -> FinetuneConfig:
    return FinetuneConfig(load=Path("base"), save=Path("s"), mock_data=True, **settings).check()


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with a number of GPUs, their GiB, how much of it is free, and the GiB of free RAM."""

    def pretend(
        count: int,
        gib: float | None,
        free: float | None = None,
        ram: float = 1000,
        capability: tuple[int, int] = HOPPER,
    ) -> None:
        found = None if gib is None else AvailableGpu(gib * GIB, (free or gib) * GIB, capability)
        monkeypatch.setattr(choose, "available_gpu", lambda *_: found)
        monkeypatch.setattr(choose, "host_memory", lambda: ram * GIB)
        monkeypatch.setattr(choose, "describe_base", lambda _: BASE)
        monkeypatch.setattr(choose.processes, "process_count", lambda _: count)

    return pretend


def test_auto_takes_experts_before_attention(on_gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpus(8, 32)
    config = settled(run())
    assert (config.tensor_model_parallel_size, config.expert_model_parallel_size) == (1, 8)
    assert config.recompute == "none"
    assert "Plan: TP1/EP8, recompute none" in capsys.readouterr().out
    on_gpus(8, 139.8)
    assert settled(run()).expert_model_parallel_size == 1


def test_a_given_size_is_kept_and_the_other_one_chosen(on_gpus: Any) -> None:
    on_gpus(8, 32)
    assert settled(run(tensor_model_parallel_size=2)).layout_sizes == (2, 8)
    assert settled(run(expert_model_parallel_size=4, base_precision="nf4")).layout_sizes == (1, 4)
    on_gpus(4, None)
    assert settled(run(tensor_model_parallel_size=4)).layout_sizes == (4, 4)


@pytest.mark.parametrize(
    ("former", "sizes"),
    [
        ({"layout": "auto"}, (1, 8)),
        ({"layout": "auto", "tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}, (1, 8)),
        ({"layout": "given", "tensor_model_parallel_size": 4, "expert_model_parallel_size": 2}, (4, 2)),
        ({"layout": "given"}, (2, 4)),
    ],
)
def test_configs_of_earlier_versions_get_the_layout_that_they_had(
    on_gpus: Any, former: dict[str, Any], sizes: tuple[int, int]
) -> None:
    on_gpus(8, 32)
    values = run().to_mapping() | former
    config = settled(FinetuneConfig.from_mapping(values).check())
    assert (config.layout_sizes, config.layout) == (sizes, None)


@pytest.mark.parametrize(
    ("count", "gib", "settings", "sizes"),
    [
        # All weights are on one GPU of 140 GiB only without their gradients: SGD within the backward pass.
        (8, 79.1, {}, (1, 8)),
        (2, 139.7, {}, (1, 2)),
        # The batch cannot be split over eight replicas.
        (8, 79.1, {"global_batch_size": 4}, (2, 8)),
        (8, None, {"global_batch_size": 2}, (4, 8)),
        (3, None, {}, (1, 1)),
        (6, None, {}, (1, 2)),
    ],
)
def test_pretrain_takes_the_smallest_tp_and_the_largest_ep(
    on_gpus: Any, count: int, gib: float | None, settings: dict[str, Any], sizes: tuple[int, int]
) -> None:
    on_gpus(count, gib)
    config = PretrainConfig(load=Path("base"), mock_data=True, **settings)
    assert settled(config).layout_sizes == sizes


def test_generate_gets_a_layout_and_says_so_once(on_gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpus(8, 79.1)
    config = settled(GenerateConfig(load=Path("base"), prompt=("a",)))
    assert config.layout_sizes == (1, 8)
    assert capsys.readouterr().out == "Layout: TP1/EP8 for 8 processes, chosen by the planner\n"
    # A quarter of the experts and all of attention leave too little of 27 GiB: attention is split as well.
    on_gpus(4, 27)
    assert settled(GenerateConfig(load=Path("base"), prompt=("a",))).layout_sizes == (2, 4)
    given = GenerateConfig(load=Path("base"), prompt=("a",), tensor_model_parallel_size=2, expert_model_parallel_size=4)
    assert settled(given) == given
    capsys.readouterr()
    settled(GenerateConfig(load=Path("base"), prompt=("a",), json=True))
    printed = capsys.readouterr()
    assert (printed.out, "Layout: " in printed.err) == ("", True)


def test_a_base_that_cannot_be_read_is_left_to_the_checks(on_gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(8, 80)
    monkeypatch.setattr(choose, "describe_base", describe_base)
    assert settled(run()) == run()


def test_auto_keeps_to_what_the_batch_allows(on_gpus: Any) -> None:
    on_gpus(8, 32)
    # Four samples cannot be shared out over eight replicas; over the four of TP2 they can.
    assert settled(run(global_batch_size=4)).tensor_model_parallel_size == 2


def test_auto_says_when_nothing_fits(on_gpus: Any) -> None:
    on_gpus(1, 80)
    with pytest.raises(ConfigError) as caught:
        settled(run(kernels="portable"))
    command = "mixtral-run plan --gpus 1 --gpu-memory 80 --seq-length 512 --micro-batch-size 1"
    assert f"{command} --kernels portable --load base --all" in " ".join(str(caught.value).split())


def test_recomputation_is_the_least_that_fits(on_gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    layout = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1}
    for seq_length, *expected in ((2048, "none", None), (8192, "selective", None), (16384, "except-attention", 20)):
        on_gpus(1, 139.8)
        config = settled(run(**layout, seq_length=seq_length))
        assert [config.recompute, config.recompute_layers] == expected
        assert memory_error(config, BASE, 1) is None
    assert "Plan: TP1/EP1, recompute except-attention in 20 layers: 129." in capsys.readouterr().out
    # What was given stays, also if more would be fast.
    given = settled(run(**layout, seq_length=16384, recompute="except-attention"))
    assert (given.recompute, given.recompute_layers) == ("except-attention", None)
    given = settled(run(**layout, seq_length=16384, recompute="full", recompute_layers=25))
    assert (given.recompute, given.recompute_layers) == ("full", 25)
    error = memory_error(run(**layout, seq_length=16384, recompute="full", recompute_layers=5), BASE, 1)
    assert error is not None and "--recompute except-attention --recompute-layers 20" in str(error)


def test_inputs_go_to_the_host_as_the_last_step(on_gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    layout = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 8, "expert_chunks": 1}
    on_gpus(8, 32)
    assert settled(run(**layout, seq_length=16384)).recompute == "full"
    config = settled(run(**layout, seq_length=24576))
    assert config.recompute == "offload"
    assert memory_error(config, BASE, 8) is None
    assert "64.0 GiB of host RAM" in capsys.readouterr().out
    # Where another layout does without, it is taken.
    config = settled(run(seq_length=24576, expert_chunks=1))
    assert (config.tensor_model_parallel_size, config.recompute) == (2, "except-attention")


def test_experts_compute_in_chunks_where_memory_needs_it(on_gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    layout = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 8}
    on_gpus(8, 32)
    assert settled(run(**layout, seq_length=16384, recompute="full")).expert_chunks == 1
    config = settled(run(**layout, seq_length=24576))
    assert (config.recompute, config.expert_chunks) == ("full", 3)
    assert "Plan: TP1/EP8, recompute full, experts in 3 chunks: 26.9 of 32.0 GiB a GPU" in capsys.readouterr().out
    assert memory_error(config, BASE, 8) is None
    # Also if all else is given, and as many chunks as were asked for.
    assert settled(run(**layout, seq_length=24576, recompute="full")).expert_chunks == 3
    assert settled(run(**layout, seq_length=24576, expert_chunks=6)).expert_chunks == 6
    refused = memory_error(run(**layout, seq_length=24576, recompute="full", expert_chunks=1), BASE, 8)
    assert refused is not None and "--recompute full --expert-chunks 3" in str(refused)
    # What fits nowhere keeps the recomputation that was given.
    on_gpus(8, 20)
    smallest = settled(run(**layout, seq_length=24576, recompute="full"))
    assert (smallest.recompute, smallest.expert_chunks) == ("full", 3)
    assert memory_error(smallest, BASE, 8) is not None


def test_on_a_cpu_chunks_stay_as_given(on_gpus: Any) -> None:
    on_gpus(2, None)
    assert settled(run()).expert_chunks == 1
    config = settled(run(expert_chunks=3))
    assert (config.expert_chunks, config.recomputation) == (3, "full")


def test_a_host_without_the_ram_is_reported(on_gpus: Any) -> None:
    layout = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 8, "expert_chunks": 1}
    on_gpus(8, 32, ram=79)
    error = memory_error(settled(run(**layout, seq_length=24576)), BASE, 8)
    assert error is not None
    assert "at most 63.2 GiB, 80% of the 79.0 GiB that are free" in str(error)
    assert "64.0 GiB for the layers' inputs on 8 GPUs" in str(error)
    refused = memory_error(run(**layout, seq_length=24576, recompute="offload"), BASE, 8)
    assert refused is not None and refused.next_command == (
        "mixtral-run plan --gpus 8 --gpu-memory 32 --host-memory 79 --seq-length 24576 --micro-batch-size 1 "
        "--load base --all"
    )
    on_gpus(8, 32, ram=81)
    assert memory_error(run(**layout, seq_length=24576, recompute="offload"), BASE, 8) is None


def test_the_host_is_asked() -> None:
    assert 0 < available.host_memory() < psutil.virtual_memory().total


def test_a_host_keeps_for_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose.workload_of(run(), BASE, 16, HOPPER).gpus_per_host == 16
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert choose.workload_of(run(), BASE, 16, HOPPER).gpus_per_host == 4


def test_what_was_given_stays(on_gpus: Any) -> None:
    on_gpus(8, 139.8)
    for given in ({"recompute": "full"}, {"recompute_activations": True}, {"recompute": "none"}):
        config = run(**given, tensor_model_parallel_size=2, expert_model_parallel_size=4)
        found = settled(config)
        assert (found.layout_sizes, found.recomputation, found.context_size) == ((2, 4), config.recomputation, 1)
    kept = settled(run(recompute_activations=True))
    assert kept.recomputation == "full"


def test_on_a_cpu_nothing_is_refused(on_gpus: Any) -> None:
    on_gpus(2, None)
    config = settled(run())
    assert (config.tensor_model_parallel_size, config.expert_model_parallel_size, config.recompute) == (1, 2, "none")
    assert memory_error(config, BASE, 2) is None


def test_a_run_that_cannot_fit_is_refused_with_one_that_can(on_gpus: Any) -> None:
    on_gpus(8, 31.7)
    config = run(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    error = memory_error(settled(config), BASE, 8)
    assert error is not None
    text = str(error)
    assert "at most 31.7 GiB a GPU" in text and "weights 43" in text
    assert "--tensor-model-parallel-size 1 --expert-model-parallel-size 8 --recompute none" in text


def test_where_no_layout_fits_it_says_what_would(on_gpus: Any) -> None:
    on_gpus(1, 79.6)
    config = run(tensor_model_parallel_size=1, expert_model_parallel_size=1)
    error = memory_error(settled(config), BASE, 1)
    assert error is not None and error.next_command is not None
    assert error.next_command.endswith("no layout fits on these GPUs, but --base-precision fp8 or on 2 GPUs")


def test_what_others_hold_counts(on_gpus: Any) -> None:
    config = run(tensor_model_parallel_size=1, expert_model_parallel_size=8, recompute="none")
    on_gpus(8, 80)
    assert memory_error(config, BASE, 8) is None
    on_gpus(8, 80, free=10)
    assert "free of a total of 80.0" in str(memory_error(config, BASE, 8))


def test_fp32_takes_twice_the_weights() -> None:
    workload = choose.workload_of(run(dtype="fp32"), BASE, 8, HOPPER)
    assert (workload.weight_bytes, workload.expert_bytes) == (4, 4)
    assert choose.workload_of(run(), dataclasses.replace(BASE, dtype="float32"), 8, HOPPER).weight_bytes == 4
    assert choose.workload_of(run(), BASE, 8, HOPPER).weight_bytes == 2


def test_the_gpus_are_queried_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # STAND-IN for the GPUs: the process is real, and prints what three of them would.
    answers = "[10000000000, 80000000000, [9, 0]], [30000000000, 70000000000, [8, 6]], [5, 5, [7, 0]]"
    query = f"import sys; print('[{answers}]') if sys.argv[1] in ('0', '2') else None"
    monkeypatch.setattr(available, "_QUERY", ("-c", query))
    available.available_gpu.cache_clear()
    expected = AvailableGpu(70e9, 10e9 + CONTEXT, (8, 6))
    assert available.available_gpu("auto", 2) == expected
    monkeypatch.setattr(available, "_QUERY", ("-c", "raise SystemExit(1)"))
    assert available.available_gpu("auto", 2) == expected  # cached
    assert available.available_gpu("cpu", 2) is None
    available.available_gpu.cache_clear()
    assert available.available_gpu("auto", 2) is None
    available.available_gpu.cache_clear()


@pytest.mark.parametrize(("words", "asked"), [({}, "0"), ({"nproc_per_node": 2}, "2")])
def test_the_query_can_start_ahead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: dict[str, int], asked: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    answer = "[[3, 9, [9, 0]], [2, 9, [9, 0]]]"
    query = f"import sys; assert sys.argv[1] == '{asked}'; print('{answer}')"
    monkeypatch.setattr(available, "_QUERY", ("-c", query))
    available.available_gpu.cache_clear()
    config = run(device="cuda", **words)
    available.ask_ahead(config)
    assert not available._started_queries  # no GPU here
    monkeypatch.setattr(available, "Path", lambda _: tmp_path)
    daemons: SimpleQueue[bool] = SimpleQueue()
    monkeypatch.setattr(available, "copy_from_image", lambda: daemons.put(threading.current_thread().daemon))
    available.ask_ahead(config)
    assert daemons.get(timeout=30), "a command that ends at once would wait for the copy"
    monkeypatch.setattr(available, "_QUERY", ("-c", "raise SystemExit(1)"))
    assert available.available_gpu("cuda", 2) == AvailableGpu(9, 9, HOPPER)
    assert not available._started_queries
    available.available_gpu.cache_clear()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("print('[[3, 9, [9, 0]], [2, 8, [8, 0]]]')", AvailableGpu(8, 8, (8, 0))),
        (
            "import sys; print('a driver says'); print('[[3, 9, [9, 0]]]'); print(42); print('{}'); "
            "sys.stderr.write('x' * 200_000)",
            AvailableGpu(9, 9, HOPPER),
        ),
        ("print('[]')", None),
        ("print('a driver says'); raise SystemExit(1)", None),
        ("print('[[3, 9, [9, 0]]]', flush=True); import os; os.abort()", None),
    ],
)
def test_the_local_gpu_is_queried_only_if_the_driver_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, query: str, expected: AvailableGpu | None
) -> None:
    monkeypatch.setattr(available, "_QUERY", ("-c", query))
    monkeypatch.setattr(available, "Path", lambda _: tmp_path / "missing")
    assert available.local_gpu() is None
    monkeypatch.setattr(available, "Path", lambda _: tmp_path)
    assert available.local_gpu() == expected


def test_no_query_outlives_its_answer_or_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = "print('[[3, 9, [9, 0]]]', flush=True); import time; time.sleep"
    monkeypatch.setattr(available, "_QUERY", ("-c", f"{answer}(0.3)"))
    query = available._start_query(0)
    assert available._query_result(query) == AvailableGpu(9, 9, HOPPER)
    assert query.returncode == 0  # its contexts are gone
    monkeypatch.setattr(available, "_QUERY", ("-c", f"{answer}(100)"))
    monkeypatch.setattr(available, "QUERY_SECONDS", 0.3)
    query = available._start_query(0)
    assert available._query_result(query) is None
    assert query.returncode == -signal.SIGKILL
    out, err = capsys.readouterr()
    assert out == "" and "! The NVIDIA driver did not answer within 0 s" in err


def test_a_run_on_older_gpus_is_planned_as_it_runs(on_gpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """TP1/EP8 at 2,048 tokens needs 36.9 GiB captured, and 28.8 GiB on Turing, which has no grouped products."""
    config = run(tensor_model_parallel_size=1, expert_model_parallel_size=8, seq_length=2048)
    for capability, needed in (((7, 5), "28.8"), ((8, 0), "36.9"), (HOPPER, "36.9")):
        on_gpus(8, 39.4, capability=capability)
        assert settled(config).recompute == "none"
        assert f"Plan: TP1/EP8, recompute none: {needed} of 39.4 GiB a GPU" in capsys.readouterr().out


def test_attention_in_8_bit_gets_a_layout_that_can_or_an_error_that_names_one(
    on_gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32,002 words are 16,001 on each rank of TP2; of TP4 they are padded to 8,064."""
    odd = dataclasses.replace(BASE, architecture=dataclasses.replace(MIXTRAL_8X7B, vocab_size=32002))
    on_gpus(4, 139.8)
    assert settled(run(attention_precision="fp8"), odd).layout_sizes[0] == 4
    assert settled(run(attention_precision="fp8"), BASE).layout_sizes[0] == 1
    monkeypatch.setattr(table, "describe_base", lambda _: odd)
    plan = PlanConfig(load=Path("base"), gpu="h200", attention_precision="fp8", gpus=4, json=True)
    table.show_plan(plan)
    found = "found 32002; --tensor-model-parallel-size 4 or --tensor-model-parallel-size 8 makes them so"
    with pytest.raises(ConfigError, match=found):
        settled(run(attention_precision="fp8", tensor_model_parallel_size=1), odd)
    on_gpus(2, 139.8)
    with pytest.raises(ConfigError, match=found):
        settled(run(attention_precision="fp8"), odd)
    with pytest.raises(ConfigError, match=found):
        table.show_plan(dataclasses.replace(plan, gpus=2))
    monkeypatch.setattr(preflight, "available_gpu", choose.available_gpu)
    monkeypatch.setattr(preflight.processes, "process_count", lambda _: 2)
    given = run(attention_precision="fp8", tensor_model_parallel_size=2, expert_model_parallel_size=2)
    (problem,) = preflight.layout_problems(settled(given, odd), odd)
    assert "found 16001; --tensor-model-parallel-size 4" in problem

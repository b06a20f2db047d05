"""Checks before a run starts or resumes."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_run.config.gpus import HOPPER
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.launch.stop_request import STOP_SIGNALS, stop_requests
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.planner import choose
from mixtral_run.planner.available import AvailableGpu
from mixtral_run.planner.workload import GIB
from mixtral_run.train import preflight
from mixtral_run.train.model_limits import recompute_problems
from mixtral_run.train.preflight import adapter_bytes, check_resume, output_problems, start_problems
from mixtral_run.train.run_checkpoints import changed_order, remove_leftovers
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription

OTHER_FORMS: list[tuple[dict[str, object], str]] = [
    ({"lora_rank_experts": 4}, "--lora-rank-experts: the checkpoint has none; found 4"),
    ({"lora_alpha_experts": 4.0}, "--lora-alpha-experts: the checkpoint has none; found 4"),
    ({"train_also": ("norms", "router")}, "--train-also: the checkpoint has none; found norms,router"),
    ({"expert_adapters": "shared"}, "--expert-adapters: the checkpoint has each; found shared"),
    ({"init_lora": "pissa"}, "--init-lora: the checkpoint has default; found pissa"),
]


def config(save: Path, **more: object) -> FinetuneConfig:
    return FinetuneConfig(**{"load": Path("base"), "save": save, "mock_data": True, "device": "cpu", **more})


def test_a_run_that_failed_before_its_first_checkpoint_can_start_again(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / ".iter_0000005.partial/shard").mkdir(parents=True)
    assert output_problems(tmp_path, resume=None) == []
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("")
    assert output_problems(tmp_path, resume=None)
    remove_leftovers(tmp_path)
    assert (tmp_path / "mine").exists()


def test_nothing_of_a_complete_adapter_is_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    remove_leftovers(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()


def test_more_layers_than_the_model_has_are_refused() -> None:
    base = BaseDescription(Path("base"), MIXTRAL_8X7B, "bfloat16", "")
    assert [recompute_problems(layers, base) for layers in (None, 1, 32)] == [[], [], []]
    assert recompute_problems(33, base) == ["--recompute-layers 33: expected at most 32, the layers of the model"]


@pytest.mark.parametrize("kernels", ["portable", "hopper"])
def test_kernels_that_a_run_would_not_use_are_refused(tmp_path: Path, kernels: str) -> None:
    base = BaseDescription(Path("base"), MIXTRAL_8X7B, "bfloat16", "")
    assert preflight.layout_problems(config(tmp_path), base) == []
    (problem,) = preflight.layout_problems(config(tmp_path, kernels=kernels), base)
    assert problem.startswith(f"--kernels {kernels}: expected GPUs of compute capability")
    assert problem.endswith("; found a CPU")


def test_attention_in_8_bit_is_refused_on_other_gpus_and_not_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BaseDescription(Path("base"), MIXTRAL_8X7B, "bfloat16", "")
    assert preflight.layout_problems(config(tmp_path, attention_precision="fp8"), base) == []
    monkeypatch.setattr(preflight, "available_gpu", lambda *_: SimpleNamespace(compute_capability=(9, 0)))
    assert preflight.layout_problems(config(tmp_path, attention_precision="fp8"), base) == []
    monkeypatch.setattr(preflight, "available_gpu", lambda *_: SimpleNamespace(compute_capability=(8, 6)))
    odd = BaseDescription(Path("base"), dataclasses.replace(MIXTRAL_8X7B, vocab_size=32002), "bfloat16", "")
    given = config(
        tmp_path, attention_precision="fp8", dtype="fp32", tensor_model_parallel_size=1, expert_model_parallel_size=1
    )
    problems = preflight.layout_problems(given, odd)
    assert [each.rpartition("found ")[2].partition(";")[0] for each in problems] == ["8.6", "another dtype", "32002"]


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterDescription:
    lora = LoraSettings.from_config(config(tmp_path))
    found = AdapterDescription(tmp_path, 500, lora, "", {}, None)
    monkeypatch.setattr(preflight, "describe_adapter", lambda _: found)
    monkeypatch.setattr(preflight, "check_adapter_fits", lambda *_: None)
    return found


def test_a_start_from_the_weights_needs_as_many_ranks(tmp_path: Path) -> None:
    base = SimpleNamespace(architecture=MIXTRAL_8X7B)
    wide = config(tmp_path, init_lora="olora", lora_rank=16, lora_rank_experts=4097)
    found = start_problems(wide, base)
    assert [each.partition(";")[0] for each in found] == [
        f"--init-lora olora: expected a rank of at most 4096 for {name}" for name in ("linear_fc1", "linear_fc2")
    ]
    assert start_problems(config(tmp_path, lora_rank=10**4), base) == []


def test_resume_needs_the_same_adapter_and_something_to_do(tmp_path: Path, adapter: AdapterDescription) -> None:
    assert check_resume(config(tmp_path, train_iters=501), None) is adapter
    with pytest.raises(ConfigError, match="The run is complete"):
        check_resume(config(tmp_path, train_iters=500), None)
    with pytest.raises(ConfigError, match="the checkpoint has 16; found 8") as caught:
        check_resume(config(tmp_path, train_iters=501, lora_rank=8), None)
    assert "--lora-rank 16 --lora-alpha 32 --lora-target-modules linear_" in str(caught.value.next_command)
    for changes, words in OTHER_FORMS:
        with pytest.raises(ConfigError) as caught:
            check_resume(config(tmp_path, train_iters=501, **changes), None)
        assert words in str(caught.value)


def test_an_output_folder_that_cannot_be_used_names_the_next_command(tmp_path: Path) -> None:
    def next_command(save: Path, *, resume: str | None) -> str | None:
        (error,) = preflight._errors(config(save, resume=resume), 2, None, reads_data=False)
        return error.next_command

    nothing = next_command(tmp_path / "new", resume="yes")
    assert nothing is not None and nothing.startswith("the same command without --resume")
    (tmp_path / "mine").write_text("")
    assert next_command(tmp_path, resume=None) == "the same command with another --save"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert "or with --resume" in str(next_command(tmp_path, resume=None))


def test_a_data_file_with_other_content_is_noticed(tmp_path: Path) -> None:
    data = tmp_path / "my.jsonl"
    data.write_text("one")
    now = config(tmp_path, mock_data=False, data_path=(str(data),))
    lora = LoraSettings.from_config(now)
    known = AdapterDescription(tmp_path, 5, lora, "", now.to_mapping(), "of other content")
    assert changed_order(now, known, "of this one") == [f"--data-path {data} (its content has changed)"]
    assert changed_order(now, known, "of other content") == []
    assert changed_order(now, AdapterDescription(tmp_path, 5, lora, "", now.to_mapping(), None), "of this one") == []


def test_a_run_that_stopped_early_is_not_resumed_by_the_same_command(
    tmp_path: Path, adapter: AdapterDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"iteration": 500, "loss": 2.0, "best_iteration": 300, "best_loss": 1.0, "num_without_improvement": 2}
    over = dataclasses.replace(adapter, validation=best)
    monkeypatch.setattr(preflight, "describe_adapter", lambda _: over)
    asked = {"train_iters": 900, "valid_fraction": 0.1}
    with pytest.raises(ConfigError, match="stopped early") as caught:
        check_resume(config(tmp_path, **asked, early_stopping_patience=2), None)
    assert "after 2 evaluations" in str(caught.value) and "iteration 300" in str(caught.value)
    assert "A larger --early-stopping-patience" in str(caught.value)
    for patience in (0, 3):
        assert check_resume(config(tmp_path, **asked, early_stopping_patience=patience), None) is over


def test_iterations_of_epochs_are_compared_once_they_are_known(tmp_path: Path, adapter: AdapterDescription) -> None:
    asked = config(tmp_path, mock_data=False, data_path=(str(tmp_path / "x.jsonl"),), epochs=2.0)
    assert check_resume(asked, None) is adapter
    with pytest.raises(ConfigError, match="The run is complete") as caught:
        check_resume(asked.with_iterations(2000, 8), None)
    assert "iteration 500 of 500" in str(caught.value) and "A larger --epochs" in str(caught.value)
    assert check_resume(asked.with_iterations(2001, 8), None) is adapter


def test_only_checkpoints_to_come_need_disk_space(tmp_path: Path) -> None:
    from types import SimpleNamespace

    base = SimpleNamespace(architecture=SimpleNamespace(num_adapter_parameters=lambda *_: 100))
    asked = config(tmp_path, train_iters=20_000, save_interval=500)
    assert adapter_bytes(asked, base, 0) == 41 * 1200
    assert adapter_bytes(asked, base, 19_000) == 3 * 1200


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_of_a_stop_is_a_request(tmp_path: Path, number: signal.Signals) -> None:
    layout = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1}
    with open_mesh(config(tmp_path, **layout)) as mesh, stop_requests(mesh) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()


def test_generate_is_refused_before_weights_that_do_not_fit_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseDescription(Path("base"), MIXTRAL_8X7B, "bfloat16", "f")
    plain = GenerateConfig(load=Path("base"), prompt=("a",), tensor_model_parallel_size=1, expert_model_parallel_size=1)

    def error_on(count: int, gib: float, **changes: object) -> ConfigError | None:
        gpu = AvailableGpu(gib * GIB, gib * GIB, HOPPER)
        monkeypatch.setattr(choose, "available_gpu", lambda *_: gpu)
        return choose.inference_memory_error(dataclasses.replace(plain, **changes), base, count)  # type: ignore[arg-type]

    error = error_on(1, 79.1)
    assert error is not None
    assert error.found is not None and float(error.found.split()[0]) > 79.1
    assert error.next_command == "--base-precision fp8 or more GPUs, with a larger --expert-model-parallel-size"
    assert error_on(1, 79.1, base_precision="fp8") is None
    error = error_on(1, 39.4, base_precision="fp8")
    assert error is not None and (error.next_command or "").startswith("--base-precision nf4 or")
    assert error_on(1, 39.4, base_precision="nf4") is None
    assert error_on(2, 79.1, expert_model_parallel_size=2) is None

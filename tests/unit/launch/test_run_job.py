"""run_job: one call of the job's function per process, and an end of the process that the parent understands."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, MixtralRunError, WeightsError
from mixtral_run.launch import process_exit, processes, run_job
from mixtral_run.launch.stop_request import StopRequest
from mixtral_run.launch.worker_errors import ERROR_DIRECTORY_VARIABLE, collect_error
from mixtral_run.model.parallel import mesh
from mixtral_run.train import jobs

CONFIG = FinetuneConfig(load=Path("base"), save=Path("ü b"), mock_data=True, recompute="full", lora_rank=4, lr=3e-4)
calls: list[object] = []
to_raise: list[BaseException] = []


def record(config: LaunchConfig) -> None:
    """The function of the jobs below."""
    calls.append(config)
    if to_raise:
        raise to_raise[0]


JOB = run_job.Job(f"{__name__}:record", preload=())


@pytest.fixture(autouse=True)
def as_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process in place of a worker; everything that a worker changes in itself is changed back."""
    calls.clear()
    to_raise.clear()
    names = ("RANK", ERROR_DIRECTORY_VARIABLE, "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "FROM_PARENT")
    for name in names:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(mesh, "_ends_with_the_job", False)
    monkeypatch.setattr(StopRequest, "ended_a_run", False)
    # Both would watch, and change torch in, the process of all tests.
    monkeypatch.setattr(run_job, "watch_parent", lambda: None)
    monkeypatch.setattr(run_job, "start_heartbeat", lambda *_: None)


def work(folder: Path) -> None:
    config_class = "mixtral_run.config.verbs.training:FinetuneConfig"
    threads = torch.get_num_threads()
    run_job._work(str(folder), JOB.entry_point, config_class, CONFIG.to_json(), threads, {"FROM_PARENT": "set"})


def exit_code(folder: Path) -> object:
    with pytest.raises(SystemExit) as ended:
        work(folder)
    return ended.value.code


def handed_over(folder: Path) -> MixtralRunError:
    return collect_error(folder, None)


def test_a_process_of_torchrun_checks_and_calls_the_job_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    checked: list[object] = []
    run_job.run_job(JOB, CONFIG, lambda config, world_size: checked.append((config, world_size)))
    assert checked == [(CONFIG, 8)]
    assert calls == [CONFIG]


def test_the_parent_starts_processes_with_the_config_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK")
    started: list[tuple[object, ...]] = []
    monkeypatch.setattr(processes, "import_ahead", lambda modules: started.append((modules,)))
    monkeypatch.setattr(processes, "start_processes", lambda *arguments: started.append(arguments))
    config = LaunchConfig(device="cpu", nproc_per_node=4, tensor_model_parallel_size=2, expert_model_parallel_size=2)
    run_job.run_job(JOB, config)
    preloaded, (count, target, entry_point, config_class, config_json, threads, _) = started
    assert preloaded == ((),)
    assert (count, target, entry_point) == (4, run_job._work, JOB.entry_point)
    assert (config_class, config_json) == ("mixtral_run.config.launch:LaunchConfig", config.to_json())
    assert isinstance(threads, int) and threads >= 1
    assert calls == []


def test_a_failed_check_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(processes, "start_processes", lambda *_: pytest.fail("started"))

    def refuse(config: LaunchConfig, world_size: int) -> None:
        raise ConfigError("No.")

    with pytest.raises(ConfigError, match="No"):
        run_job.run_job(JOB, LaunchConfig(device="cpu", nproc_per_node=4), refuse)


def test_a_worker_gets_the_config_that_the_parent_settled(tmp_path: Path) -> None:
    work(tmp_path)
    assert calls == [CONFIG]
    assert os.environ["FROM_PARENT"] == "set"
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_kit_is_handed_over_with_its_exit_code(tmp_path: Path) -> None:
    to_raise.append(WeightsError("Broken.", where="x", problems=["one"]))
    assert exit_code(tmp_path) == 5
    error = handed_over(tmp_path)
    assert (type(error), str(error)) == (WeightsError, str(to_raise[0]))


def test_ctrl_c_is_left_to_the_parent_to_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches the parent and all processes: each word of theirs would come on top of the parent's."""
    monkeypatch.setattr(process_exit, "_ignore_signals", lambda _: None)
    (tmp_path / "0").mkdir()
    for error_file in (None, str(tmp_path / "0/error.json")):  # torchrun's folder, in which processes agree
        if error_file is not None:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
        to_raise.append(KeyboardInterrupt())
        assert exit_code(tmp_path) == 130
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""


def test_a_full_disk_is_handed_over_in_words(tmp_path: Path) -> None:
    to_raise.append(OSError(errno.ENOSPC, "No space left on device", "/out"))
    assert exit_code(tmp_path) == 5
    assert (handed_over(tmp_path).what, handed_over(tmp_path).where) == ("A file cannot be written.", "/out")


def test_a_process_that_lost_another_one_leaves_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    to_raise.append(RuntimeError("Connection closed by peer [127.0.0.1]:1234"))
    assert exit_code(tmp_path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["rank-0.consequence"]
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("MIXTRAL_RUN_DEBUG", "1")
    assert exit_code(tmp_path) == 1
    assert "Traceback" in capfd.readouterr().err


def test_any_other_error_prints_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to_raise.append(ValueError("a bug"))
    assert exit_code(tmp_path) == 1
    assert "ValueError: a bug" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_stopped_on_request_ends_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRequest, "ended_a_run", True)
    assert exit_code(tmp_path) == processes.STOPPED


@pytest.mark.parametrize("job", [jobs.FINETUNE, jobs.PRETRAIN, jobs.GENERATE, jobs.COMPARE_LOGITS])
def test_the_jobs_name_functions_that_exist(job: run_job.Job) -> None:
    assert callable(run_job._resolve(job.entry_point))

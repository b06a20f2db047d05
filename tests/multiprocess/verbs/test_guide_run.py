"""The guide's run at toy size in two processes on the CPU: its steps, what it tells, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.support.gpu_memory import GpuMemory, gpus
from tests.gpu.guide import guide_steps
from tests.gpu.guide.guide_options import default_layouts, parsed
from tests.gpu.guide.guide_run import GuideRun, main
from tests.gpu.guide.guide_steps import Step, reached, run, table, training_figures
from tests.support.processes import commands

TINY = ("--layers", "1", "--hidden-size", "128", "--ffn-hidden-size", "128", "--vocab-size", "512", "--device", "cpu")
SMALL_RUNS = ("--mock-seq-length", "32", "--mock-iterations", "2", "--real-seq-length", "64", "--real-iterations", "5")


def found_by(folder: Path, printed: str) -> tuple[list[str], dict[str, Any]]:
    """Lines printed, and the JSON file that the last of them repeats."""
    lines = printed.splitlines()
    found = json.loads((folder / "found.json").read_text())
    assert json.loads(lines[-1]) == found
    return lines, found


def words_for(folder: Path, *words: str) -> list[str]:
    return [*TINY, *words, "--output", str(folder / "found.json"), "--ram-folder", str(folder)]


def forked(argv: list[str], *, env: dict[str, str], text: bool, **options: Any) -> subprocess.Popen[str]:
    """Start a step from the warm server, which has the repository in its path."""
    assert argv[0] == sys.executable and text and env["PYTHONUNBUFFERED"] == "1"
    own = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "PYTHONUNBUFFERED")}
    same = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    return commands.start(["-u", *argv[1:]], own | same, **options)


@pytest.fixture
def guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[object, list[str], dict[str, Any]]]]:
    """A run in this process, whose steps are forked: exit code, lines printed, and the JSON file."""
    names = {name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "TimeoutExpired")}
    monkeypatch.setattr(guide_steps, "subprocess", SimpleNamespace(Popen=forked, **names))
    before = signal.getsignal(signal.SIGTERM)

    def call(*words: str) -> tuple[object, list[str], dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main(words_for(tmp_path, *words))
        return ended.value.code, *found_by(tmp_path, capsys.readouterr().out)

    yield call
    signal.signal(signal.SIGTERM, before)


def test_every_step_is_run_and_a_failed_one_stops_only_what_needs_it(tmp_path: Path, guide_run: Any) -> None:
    # Three samples cannot be shared by two processes that hold all of the attention each.
    words = ("--layouts", "TP1/EP2", "--mock-global-batch-size", "3", "--real-global-batch-size", "4")
    code, lines, found = guide_run(*SMALL_RUNS, *words, "--only", "convert,mock,real,generate,export")
    steps = {step["name"]: step for step in found["steps"]}
    assert {name: step["outcome"] for name, step in steps.items()} == {
        "make the model": "passed",
        "convert": "passed",
        "finetune, mock data": "failed",
        "finetune, real data": "passed",
        "generate": "passed",
        "export": "passed",
    }
    assert code == 1
    assert any(line.startswith("  | ") and "--global-batch-size" in line for line in lines)
    real = steps["finetune, real data"]
    assert real["figures"]["iterations"] == 5 and len(real["figures"]["peak_memory_gib"]) == 2
    assert real["figures"]["tflops_6p"] == pytest.approx(1.5 * real["figures"]["tflops_4p"])
    assert real["figures"]["load_seconds"] < real["figures"]["start_and_end_seconds"] < real["seconds"]
    # Rows of real text, so nearly none of them is padded.
    assert "padding 0 of" in (tmp_path / "found.log").read_text()
    for step in steps.values():
        assert step["seconds"] > 0 and 0 < step["peak_anonymous_gb"] <= step["peak_resident_gb"], step["name"]
        assert step["reached"] == {}
    assert steps["generate"]["figures"]["tokens"] > 0 and steps["export"]["figures"]["gb"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.log"]


def test_what_does_not_fit_into_the_time_is_left_out_and_what_is_kept_is_taken_again(
    tmp_path: Path, guide_run: Any
) -> None:
    words = ("--budget-seconds", "25", "--keep", *SMALL_RUNS, "--only", "convert,mock,real,export,smoke")
    # As a person calls it; its steps are new interpreters.
    argv = [sys.executable, "-m", "tests.gpu.guide.guide_run", *words_for(tmp_path, *words)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    _, found = found_by(tmp_path, done.stdout)
    left_out = {step["name"]: step["reason"] for step in found["steps"] if step["outcome"] == "not run"}
    assert done.returncode == 0
    assert list(left_out) == ["finetune, mock data", "finetune, real data", "export", "smoke"]
    assert "s are left" in left_out["finetune, mock data"] and "s are left" in left_out["finetune, real data"]
    assert left_out["export"] == "no adapter of mock or real"
    assert [path.name for path in (tmp_path / "mixtral-guide-run").iterdir()] == ["checkpoint"]
    guide = GuideRun(parsed([*TINY, "--seed", "1", "--layers", "2", "--ram-folder", str(tmp_path)], None))
    assert not guide.is_converted() and not guide.is_made()
    code, lines, found = guide_run(*SMALL_RUNS, "--only", "convert,generate,smoke")
    assert code == 0 and "The model of an earlier run is taken." in lines
    convert, generate, smoke = found["steps"]
    assert generate["outcome"] == "passed" and generate["figures"]["tokens"] > 0
    assert convert["reason"] == "kept from an earlier run"
    assert smoke["outcome"] == "passed" and "loss" in smoke["figures"]["pretrain 2"]["result"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.log"]


def ends(pid: int, seconds: float = 10.0) -> bool:
    """Return True if a process that was killed is gone, or a zombie, within this time: it must run once to die."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("heeds", [True, False])
def test_a_step_beyond_its_time_is_asked_to_end_then_made_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heeds: bool
) -> None:
    monkeypatch.setattr("tests.gpu.guide.guide_steps.SAVE_SECONDS", 1.0 if not heeds else 30.0)
    saved, pid = tmp_path / "saved", tmp_path / "pid"
    # A child of its own, as torchrun has: it must not outlive the step.
    program = f"""
import os, pathlib, signal, subprocess, time
child = subprocess.Popen(["sleep", "600"])
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
def save(*_):
    pathlib.Path({str(saved)!r}).touch()
    if {heeds}:
        child.kill()
        child.wait()
        os._exit(0)
signal.signal(signal.SIGTERM, save)
print("begun", flush=True)
while True:
    time.sleep(0.1)
"""
    step = Step("long")
    run(step, ["-c", program], tmp_path / "log", 2.0)
    assert step.outcome == "out of time" and saved.exists()
    assert 2.0 <= step.seconds < 20
    assert "begun" in (tmp_path / "log").read_text()
    assert ends(int(pid.read_text()))


def test_the_iterations_of_a_run_that_was_cut_off_are_reported(tmp_path: Path) -> None:
    lines = [
        {"loss": 7.0 - number, "seconds": seconds, "tokens_per_second_per_process": 100 / seconds}
        | {"tflops_per_process": 1 / seconds, "peak_memory_gib": 2.0 + number}
        for number, seconds in enumerate((9.0, 2.0, 1.0, 4.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = training_figures(tmp_path)
    assert found["iterations"] == 4 and found["first_iteration_seconds"] == 9.0
    assert found["seconds_per_iteration"] == 2.0 and found["tokens_per_second_per_process"] == 50.0
    assert (found["first_loss"], found["last_loss"], found["peak_memory_gib"]) == (7.0, 4.0, [5.0])
    assert training_figures(tmp_path / "nothing") == {}


def test_too_small_a_folder_is_reported_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(total=137e9, used=0, free=137e9)
    monkeypatch.setattr("tests.gpu.guide.guide_run.shutil.disk_usage", lambda _: room)
    guide = GuideRun(parsed(["--device", "cpu", "--ram-folder", str(tmp_path)], None))
    with pytest.raises(SystemExit, match=r"195 GB are needed and 137 GB free; .* mount -o remount,size=182g"):
        guide.check_room()
    guide.options.only = ["mock", "real"]
    guide.check_room()


def test_layouts_by_the_number_of_gpus() -> None:
    assert default_layouts(8) == [(2, 4), (1, 8)]
    assert default_layouts(4) == [(2, 4), (1, 4)]
    assert default_layouts(2) == [(2, 2), (1, 2)]
    assert default_layouts(1) == [(1, 1)]


def test_the_base_is_in_8_bit_where_16_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gpu.guide.guide_run.gpus", lambda: [("card", 79.6, 0.0)] * 2)
    for count, precision in (("1", "fp8"), ("2", "bf16")):
        assert GuideRun(parsed(["--gpus", count, "--ram-folder", str(tmp_path)], None)).precision == precision


def test_what_was_wanted_is_judged() -> None:
    convert = Step("convert", seconds=99, peak_resident_gb=3.9, figures={"gpu_gib_taken": 0.0})
    assert reached(convert, 2) == {"time": True, "RAM": True, "GPU": True}
    mock = Step("finetune, mock data", "TP1/EP8", seconds=61, peak_gpu_gib=[17.0, 18.1])
    assert reached(mock, 8) == {"time": False, "GPU": False}
    assert reached(mock, 4) == {"time": False}
    real = Step("finetune, real data", figures={"tokens_per_second_per_process": 2967.0})
    assert reached(real, 8) == {"speed": True}
    real.outcome, real.reached, real.figures["peak_memory_gib"] = "passed", {"speed": True}, [1.0, 2.5]
    shown = table([real, Step("smoke", reason="no checkpoint of convert")]).splitlines()
    assert "2.5" in shown[1] and "2,967" in shown[1] and "speed ✓" in shown[1]
    assert "not run" in shown[2] and "no checkpoint of convert" in shown[2]


def test_the_memory_of_gpus_is_the_highest_value_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *loop-ms*) for used in 512 3072 1024; do echo "0, $used"; echo "1, 256"; done; '
        'exec sleep 60;; *) echo "NVIDIA H100 80GB HBM3, 81559, 4";; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpus() == [("NVIDIA H100 80GB HBM3", 81559 / 1024, 4 / 1024)]
    with GpuMemory() as memory:
        while len(memory.peak_gib) < 2 or memory.peak_gib[0] < 3:
            pass
    assert memory.peak_gib == [3.0, 0.25]

"""The acceptance program on a CPU: figures of real collectives over gloo, floors, and problems reported together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_run.trial.acceptance import Floors, Report, _compare, measure


def test_a_cpu_is_measured_and_accepted(tmp_path: Path) -> None:
    report = measure(tmp_path, Floors(shared_memory_gib=0.001, matrix_tflops=1e9), size_mib=2)
    assert report.accepted and report.device == "cpu"
    assert {"all_reduce_gb_per_second", "all_to_all_gb_per_second", "checkpoint_read_gb_per_second"} <= set(
        report.figures
    )
    assert all(value > 0 for value in report.figures.values())
    assert "collectives over NCCL" in report.not_run
    assert not list(tmp_path.iterdir())


def test_every_problem_is_reported_and_the_exit_code_is_4(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mixtral_run.trial.acceptance", "--json", "--size-mib", "1"]
    argv += ["--checkpoint-folder", str(tmp_path / "none"), "--floors", '{"num_gpus": 8, "shared_memory_gib": 1e6}']
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    report = json.loads(done.stdout)
    assert done.returncode == 4 and not report["accepted"]
    assert [problem.split(":")[0] for problem in report["problems"]] == [
        "checkpoint folder",
        "num_gpus",
        "shared_memory_gib",
    ]
    assert report["figures"]["all_reduce_gb_per_second"] > 0


def test_an_unknown_floor_is_refused() -> None:
    argv = [sys.executable, "-m", "mixtral_run.trial.acceptance", "--floors", '{"matrix_tflop": 1}']
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "matrix_tflop;" in done.stderr and "matrix_tflops" in done.stderr


@pytest.mark.parametrize(("device", "num_problems"), [("cuda", 2), ("cpu", 0)])
def test_floors_of_gpus_are_asked_of_gpus_alone(device: str, num_problems: int) -> None:
    report = Report(device=device, num_gpus=8, torch_version="x", cuda_version=None, figures={"matrix_tflops": 10.0})
    _compare(report, Floors(num_gpus=8, matrix_tflops=60, all_reduce_gb_per_second=40))
    assert len(report.problems) == num_problems


@pytest.mark.parametrize(("num_gpus", "num_problems"), [(1, 0), (2, 2)])
def test_one_gpu_is_asked_for_no_rate_between_gpus(num_gpus: int, num_problems: int) -> None:
    rates = {"all_reduce_gb_per_second": 0.0, "all_to_all_gb_per_second": 0.0}
    report = Report(device="cuda", num_gpus=num_gpus, torch_version="x", cuda_version="13", figures=rates)
    _compare(report, Floors(num_gpus=1, all_reduce_gb_per_second=40, all_to_all_gb_per_second=20))
    assert len(report.problems) == num_problems

"""The acceptance program's GPU parts."""

from pathlib import Path

import torch

from mixtral_run.trial.acceptance import Floors, measure


def test_this_machines_gpus_are_measured_and_accepted(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    floors = Floors(num_gpus=count, matrix_tflops=20.0, host_to_device_gb_per_second=1.0, shared_memory_gib=0.01)
    report = measure(tmp_path, floors)
    assert report.accepted, report.problems
    assert report.device == "cuda" and report.num_gpus == count and report.not_run == []
    # A GPU alone has nobody to send to, and reports a rate of 0.
    assert {"matrix_tflops", "host_to_device_gb_per_second", "all_reduce_gb_per_second"} <= set(report.figures)


def test_too_few_gpus_are_reported(tmp_path: Path) -> None:
    report = measure(tmp_path, Floors(num_gpus=torch.cuda.device_count() + 1), size_mib=1)
    assert not report.accepted
    assert [problem.split(":")[0] for problem in report.problems] == ["num_gpus"]

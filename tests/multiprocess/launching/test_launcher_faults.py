"""A parent that is killed takes its processes along; a process that hangs is named and the others end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.multiprocess.conftest import environment_of
from tests.support.processes import commands

RUN = (sys.executable, "-m", "mixtral_run", "finetune", "--device", "cpu", "--nproc-per-node", "2", "--mock-data")
SIZES = ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--seq-length", "32")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *RUN[1:4])
PARENT_SECONDS = 5


@pytest.mark.parametrize("launcher", ["mixtral-run", "torchrun"])
def test_a_killed_parent_takes_its_processes_along(small_checkpoint: Path, tmp_path: Path, launcher: str) -> None:
    argv = [*(RUN if launcher == "mixtral-run" else (*TORCHRUN, "--device", "cpu", "--mock-data")), *SIZES]
    argv += ["--train-iters", "100000", "--load", str(small_checkpoint), "--save", str(tmp_path / "adapter")]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        parent = subprocess.Popen(argv, stdout=stream, stderr=subprocess.STDOUT, env=environment_of())
    children: list[psutil.Process] = []
    try:
        until = time.monotonic() + 120
        while "iteration      2/100000" not in log.read_text():
            assert time.monotonic() < until and parent.poll() is None, log.read_text()
            time.sleep(0.1)
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=PARENT_SECONDS)
        assert alive == [], log.read_text()
    finally:
        for each in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        parent.kill()


@pytest.mark.parametrize(
    ("how", "why"),
    [("stopped", "is stopped by a signal"), ("loop", "does not come to the collective that the others wait in")],
)
def test_a_process_that_hangs_is_named(tmp_path: Path, how: str, why: str) -> None:
    argv = ["-m", "tests.multiprocess.launching.hang_worker", how]
    with commands.start(argv, environment_of(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        try:
            output, errors = job.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            for each in psutil.Process(job.pid).children(recursive=True):
                each.kill()
            job.kill()
            raise
    assert job.returncode == 6, output + errors
    pid = int(output.split("pid ")[1].split()[0])
    assert f"rank 1 (process {pid}) {why}" in output
    assert "last step 3, last collective all_reduce (number 3)" in output, output
    assert "rank 0 waits; last step 3, last collective all_reduce (number 4)" in output
    # The stack of the process that waits, and of the one that loops; a stopped process cannot write one.
    assert "[rank 0]" in errors and "all_reduce" in errors
    expected = "spin_for_ever" if how == "loop" else "stopped: it cannot write its stack"
    assert any(expected in line for line in errors.splitlines() if line.startswith("[rank 1]")), errors
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)

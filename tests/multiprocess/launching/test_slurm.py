"""--launcher slurm on a real Slurm of two nodes: to the end, stopped, and refused; gloo."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_run.cli.main import root
from mixtral_run.errors import HostError
from mixtral_run.fleet.launchers.records import JobRecord, read_records
from tests.support.processes.commands import forked_python
from tests.support.servers.slurm_cluster import GPUS, SlurmCluster, running_cluster

PATIENCE_SECONDS = 120
ITERATIONS = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    folder, before = tmp_path_factory.mktemp("slurm"), dict(os.environ)
    with running_cluster(folder / "site") as cluster, pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "LD_LIBRARY_PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment[name])
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        # A site's defaults in the environment must not take precedence over the flags.
        patch.setenv("SBATCH_PARTITION", "nosuch")
        patch.setenv("SBATCH_TIMELIMIT", "1")
        yield cluster
    # Fixtures of this module call the command line in this process, before the one that restores the environment.
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def forked(cluster: SlurmCluster) -> tuple[str, ...]:
    """Flags for the jobs of which another test has the same start by new interpreters: one that is queued again."""
    folder = cluster.folder.parent / "bin"
    folder.mkdir()
    python = forked_python(folder)
    return ("--python", python, "--env", f"PYTHON_EXEC={python}")


def run(*words: str) -> None:
    """The command line, in this process: the operator's side imports no torch."""
    root.main(list(words), standalone_mode=False, prog_name="mixtral-run")


def finetune(cluster: SlurmCluster, base: Path, save: Path, *more: str) -> JobRecord:
    """Start a job on both nodes and return its record."""
    run(
        "finetune", "--load", str(base), "--save", str(save), "--mock-data", "--device", "cpu", "--seq-length", "32",
        "--global-batch-size", "4", "--train-iters", str(ITERATIONS), "--save-interval", "1000", "--log-interval", "1",
        "--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--nproc-per-node", "1",
        "--no-tensorboard", "--launcher", "slurm", "--nodes", "2", "--gpus-per-node", str(GPUS), "--partition", "gpu",
        "--time", "10", "--save-seconds", "60", "--container-runtime", "none", "--python", sys.executable,
        "--jobs-folder", str(cluster.folder.parent / "jobs"), "--env", "OMP_NUM_THREADS=1", *more,
    )  # fmt: skip
    return read_records()[0]


def log(record: JobRecord) -> str:
    return Path(record.extra["folder"], "log.txt").read_text()


def wait_for(record: JobRecord, text: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while text not in " ".join(log(record).split()):
        assert time.monotonic() < until, log(record)
        time.sleep(0.1)


def losses(save: Path) -> list[tuple[int, float]]:
    return [(line["iteration"], line["loss"]) for line in map(json.loads, (save / "metrics.jsonl").open())]


@pytest.fixture(scope="module")
def whole(
    cluster: SlurmCluster, forked: tuple[str, ...], small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of a run that nothing disturbed."""
    save = tmp_path_factory.mktemp("whole") / "adapter"
    record = finetune(cluster, small_checkpoint, save, *forked)
    printed = log(record)
    assert "LoRA fine-tuning complete" in printed and "finetune is done" in printed, printed
    assert "Traceback" not in printed
    return save


def test_a_job_runs_to_its_end_on_two_nodes(
    cluster: SlurmCluster, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_records()[0]
    assert "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", record.scheduler_id)
    assert [iteration for iteration, _ in losses(whole)] == list(range(1, ITERATIONS + 1))
    run("jobs")
    assert "completed (0)" in capsys.readouterr().out
    run("logs", record.name, "--tail", "1")
    assert capsys.readouterr().out.count("\n") == 1
    run("fetch", record.name, str(tmp_path))
    assert (tmp_path / "adapter/latest_checkpointed_iteration.txt").read_text() == f"{ITERATIONS}\n"


def test_a_job_is_queued_again_at_its_time_limit_and_continues(
    cluster: SlurmCluster, small_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "adapter"
    record = finetune(cluster, small_checkpoint, save, "--detach")
    wait_for(record, "iteration 3/")
    # What Slurm itself sends at --save-seconds before the limit, without a minute of waiting for it.
    cluster.run("scancel", "--batch", "--signal=USR1", record.scheduler_id)
    wait_for(record, "queued again, restart 1 of at most 3")
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < ITERATIONS
    until = time.monotonic() + PATIENCE_SECONDS
    while "JobState=PENDING" not in cluster.run("scontrol", "show", "job", record.scheduler_id):
        assert time.monotonic() < until
        time.sleep(0.2)
    # A node refuses an attempt that starts in the same second as the one before ended: their credentials differ by that
    # second only. Slurm itself waits for two minutes.
    time.sleep(2)
    cluster.run("scontrol", "update", f"jobid={record.scheduler_id}", "starttime=now")
    run("logs", "--follow", record.name)
    printed = log(record)
    assert "asking the job to save" in printed and "as requested" in printed
    assert "attempt 2 of at most 4" in printed and f"iteration {saved}\n" in printed
    assert "Traceback" not in printed
    assert losses(save) == losses(whole)


def test_a_job_that_is_stopped_saves_and_stays_stopped(
    cluster: SlurmCluster,
    forked: tuple[str, ...],
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = tmp_path / "adapter"
    record = finetune(cluster, small_checkpoint, save, "--detach", "--train-iters", "100000", *forked)
    wait_for(record, "iteration 2/")
    run("stop", record.name)
    assert "has ended" in capsys.readouterr().out
    assert int((save / "latest_checkpointed_iteration.txt").read_text()) >= 2
    assert "stopped, as requested (exit code 143)" in log(record)
    state = cluster.run("scontrol", "show", "job", record.scheduler_id)
    assert "JobState=FAILED" in state and "Restarts=0" in state and "ExitCode=143:0" in state


def test_what_slurm_refuses_leaves_nothing(cluster: SlurmCluster, tmp_path: Path) -> None:
    before = {each.name for each in read_records()}
    with pytest.raises(HostError, match="Slurm refuses the job") as caught:
        finetune(cluster, tmp_path, tmp_path / "adapter", "--partition", "nosuch")
    assert "invalid partition" in str(caught.value).lower()
    jobs = cluster.folder.parent / "jobs"
    assert {each.name for each in read_records()} == before
    assert {each.name for each in jobs.iterdir()} <= before

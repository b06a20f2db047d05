"""The script that starts a container on a free host, run here by sh with a STAND-IN for docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.fleet.jobs import taking
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.job_spec import JobOptions, JobSpec, make_spec
from mixtral_run.fleet.jobs.taking import BUSY, CORDONED, job_in, start_argv

DOCKER = """#!/bin/sh
# STAND-IN for docker: `running` holds verb and job of each running container, a line each. A start takes a while.
# `ended`: no container is listed when it is asked for by its name. `asked`: the engine was asked for processes.
cd '{folder}' || exit 1
case "$1" in
  ps) [ ! -e broken ] || {{ echo "no engine" >&2; exit 1; }}
    case "$2" in --quiet) [ -e ended ] || grep " ${{4##*=}}$" running; true ;; *) cat running ;; esac ;;
  attach) sleep 0.3; echo "$2 $3" >> running; echo "started: $(cat)"; exit 75 ;;
  run) sleep 0.05; echo "$2 $3" >> running; echo started ;;
  top) touch asked; cat "inside $2" ;;
esac
"""
NVIDIA_SMI = """#!/bin/sh
# STAND-IN for nvidia-smi: `used` holds the processes on the GPUs.
[ ! -e '{folder}/hangs' ] || exec sleep 60
cat '{folder}/used'
"""


class Host:
    """A host whose engine is the stand-in. argv: the command that starts a job on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "running").write_text("")
        self.docker = folder / "docker"
        self.docker.write_text(DOCKER.format(folder=folder))
        self.docker.chmod(0o755)

    def argv(self, job: str, verb: str = "finetune", share: bool = False) -> list[str]:
        config = FinetuneConfig(load=Path("base"), save=Path("adapter"), mock_data=True)
        spec = make_spec(job, verb, config, JobOptions(share=share), 1)
        return start_argv([str(self.docker), "run", verb, job], spec, HostFacts(docker=(str(self.docker),)))

    def start(self, job: str, verb: str = "finetune", share: bool = False) -> tuple[int, str]:
        done = subprocess.run(self.argv(job, verb, share), capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(taking, "LOCK_FILE", str(tmp_path / "lock"))
    monkeypatch.setattr(taking, "CORDON_FILE", str(tmp_path / "cordon.json"))
    return Host(tmp_path)


def with_gpus(host: Host, monkeypatch: pytest.MonkeyPatch, used: str) -> None:
    """Put a shell and the processes on the GPUs on a host."""
    (host.folder / "nvidia-smi").write_text(NVIDIA_SMI.format(folder=host.folder))
    (host.folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(host.folder), prepend=os.pathsep)
    (host.folder / "used").write_text(used)
    (host.folder / "running").write_text("shell shell-1\n")


def test_one_job_that_uses_the_gpus_at_a_time(host: Host) -> None:
    assert host.start("finetune-1") == (0, "started\n")
    assert host.start("finetune-2") == (BUSY, "finetune finetune-1\n")
    assert host.start("generate-1", "generate")[0] == BUSY
    assert host.start("convert-1", "convert")[0] == 0
    assert host.start("finetune-3", share=True)[0] == 0


def test_a_job_without_gpus_is_no_obstacle(host: Host) -> None:
    assert host.start("convert-1", "convert")[0] == 0
    assert host.start("finetune-1")[0] == 0


@pytest.mark.parametrize(
    ("used", "inside", "is_busy"),
    [
        ("", "  PID\n  4711\n", False),
        ("17\n", "  PID\n  4711\n  1170\n", False),
        ("17\n4711\n", "  PID\n   42\n 4711\n", True),
        ("[Not Supported]\n", "  PID\n 42\n", True),
        (None, "  PID\n 42\n", True),
        ("17\n", None, True),
    ],
    ids=[
        "idle GPUs",
        "another process",
        "its process",
        "a GPU that names none",
        "a driver that fails",
        "an engine that fails",
    ],
)
def test_an_open_shell_keeps_others_off_while_it_holds_a_gpu(
    host: Host, monkeypatch: pytest.MonkeyPatch, used: str | None, inside: str | None, is_busy: bool
) -> None:
    """used: the processes on the GPUs; inside: what the engine lists of the shell. None: the command fails."""
    with_gpus(host, monkeypatch, "")
    (host.folder / "used").unlink()
    for name, text in (("used", used), ("inside shell-1", inside)):
        if text is not None:
            (host.folder / name).write_text(text)
    (host.folder / "running").write_text("convert convert-1\nshell shell-1\n")
    expected = (BUSY, "shell shell-1\n") if is_busy else (0, "started\n")
    assert host.start("finetune-1") == expected
    if not is_busy:
        assert host.start("shell-2", "shell") == (BUSY, "finetune finetune-1\n")
    assert host.start("finetune-3", share=True)[0] == 0


def test_a_shell_that_ends_meanwhile_is_no_obstacle(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(host, monkeypatch, "17\n")
    (host.folder / "ended").touch()
    assert host.start("finetune-1") == (0, "started\n")


def test_the_engine_is_not_asked_about_shells_on_idle_gpus(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(host, monkeypatch, "")
    assert host.start("finetune-1") == (0, "started\n")
    assert not (host.folder / "asked").exists()


def test_a_driver_that_does_not_answer_keeps_the_lock_for_a_limited_time(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(host, monkeypatch, "17\n")
    (host.folder / "hangs").touch()
    monkeypatch.setattr(taking, "START_SCRIPT", taking.START_SCRIPT.replace(str(taking.ANSWER_SECONDS), "0.2"))
    began = time.monotonic()
    assert host.start("finetune-1") == (BUSY, "shell shell-1\n")
    assert time.monotonic() - began < 10


def test_without_a_driver_no_shell_holds_a_gpu(host: Host) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine has the driver")
    (host.folder / "running").write_text("shell shell-1\n")
    assert host.start("finetune-1") == (0, "started\n")


def test_of_many_at_the_same_moment_one_starts(host: Host) -> None:
    (host.folder / "lock").unlink(missing_ok=True)
    started = [
        subprocess.Popen(host.argv(f"finetune-{number}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(6)
    ]
    ends = [(process.communicate(), process.returncode) for process in started]
    assert sorted(code for _, code in ends) == [0, *[BUSY] * 5]
    (running,) = (host.folder / "running").read_text().splitlines()
    assert all(errors.strip() == running for (_, errors), code in ends if code)


@pytest.mark.parametrize("record", ['{"reason": "Xid 79"}', ""])
def test_a_cordoned_host_starts_nothing(host: Host, record: str) -> None:
    (host.folder / "cordon.json").write_text(record)
    for verb in ("finetune", "convert"):
        assert host.start("job-1", verb, share=True) == (CORDONED, record)
    assert (host.folder / "running").read_text() == ""


def test_an_attached_container_has_the_streams_and_keeps_the_lock_only_until_it_runs(host: Host) -> None:
    (host.folder / "lock").touch()
    spec = JobSpec(name="chat-1", verb="chat", config={}, options=JobOptions())
    argv = start_argv(
        [str(host.docker), "attach", "chat", "chat-1"], spec,
        HostFacts(docker=(str(host.docker),), folder=str(host.folder)), attached=True,
    )  # fmt: skip
    mark = host.folder / "chat-1/started"
    mark.parent.mkdir()
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.15)
    # The lock is taken, but the container does not run yet: this start waits for it.
    assert host.start("finetune-2") == (BUSY, "chat chat-1\n")
    assert process.poll() is None, "the next start did not wait for the container's end"
    assert process.communicate("exit\n", timeout=10) == ("started: exit\n", "")
    assert process.returncode == 75 and mark.exists(), "the code of the program itself"
    mark.unlink()
    (host.folder / "running").write_text("finetune finetune-1\n")
    for record in ([], [host.folder / "cordon.json"]):
        for file in record:
            file.write_text("{}")
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stdout + done.stderr) == (CORDONED if record else BUSY, "")
        assert not mark.exists()


def test_an_engine_that_does_not_answer_starts_nothing(host: Host) -> None:
    (host.folder / "broken").touch()
    code, text = host.start("finetune-1")
    assert code not in (0, BUSY, CORDONED) and "no engine" in text
    assert (host.folder / "running").read_text() == ""


def test_the_lock_does_not_follow_a_link(host: Host) -> None:
    (host.folder / "lock").symlink_to(host.folder / "stolen")
    assert host.start("finetune-1")[0] != 0
    assert not (host.folder / "stolen").exists()


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_a_lock_that_is_no_plain_file_is_refused_in_words(host: Host, kind: str) -> None:
    lock = host.folder / "lock"
    if kind == "fifo":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(host.folder / "running")
    done = subprocess.run(host.argv("finetune-1"), capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode == 1 and "is not a plain file" in done.stderr and str(lock) in done.stderr
    assert (host.folder / "running").read_text() == ""


def test_the_name_of_the_other_job_is_not_trusted() -> None:
    assert job_in("finetune finetune-1129-205700-3f2a\n") == "finetune-1129-205700-3f2a"
    for odd in ("", "x", "finetune a b", "finetune \x1b[2J", "finetune " + "a" * 200):
        assert job_in(odd) == "another job"

"""--launcher slurm through a login node, from the submission to the output, without Slurm and without SSH."""

from __future__ import annotations

import io
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from mixtral_run.cli.main import root
from mixtral_run.errors import HostError, MixtralRunError, Stopped, WeightsError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.launchers.records import read_records
from mixtral_run.fleet.launchers.slurm import follow, launcher
from mixtral_run.fleet.ssh.connection import Answer, Ssh

SBATCH = """#!/bin/sh
case "$1" in
  --test-only) if [ -e "$SITE/refuses" ]; then echo "sbatch: error: no account" >&2; exit 1; fi
    echo "sbatch: Job 4 to start at once" >&2 ;;
  --parsable) echo "5;cluster"; basename "$PWD" >"$SITE/name"; echo "RUNNING 0:0" >"$SITE/state"
    printf 'one\\ntwo\\n' >>log.txt ;;
esac
"""
SCONTROL = """#!/bin/sh
if [ -e "$SITE/down" ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi
read -r state code <"$SITE/state"
if [ "$state" = FORGOTTEN ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
echo "JobId=5 JobName=$(cat "$SITE/name") JobState=$state Reason=None Restarts=0 ExitCode=$code NodeList=n[1-2]"
"""
SCANCEL = """#!/bin/sh
echo "$*" >>"$SITE/canceled"
echo "FAILED 143:0" >"$SITE/state"
"""


class Login:
    """STAND-IN for a login node behind SSH: its commands run here, with stand-ins for Slurm's programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o700)
        self.asked: list[Host] = []
        self.environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SITE": str(folder), "HOME": str(folder)}

    def run(self, _: Ssh, host: Host, command: Sequence[str], *, stdin: bytes | None = None, **__: object) -> Answer:
        self.asked.append(host)
        done = subprocess.run(command, input=stdin or b"", capture_output=True, env=self.environment, check=False)
        return Answer(done.returncode, done.stdout.decode(), done.stderr.decode())

    def stream(
        self,
        ssh: Ssh,
        host: Host,
        command: Sequence[str],
        on_line: Callable[[str], None],
        stop: threading.Event,
        *_: object,
    ) -> int:
        for line in self.run(ssh, host, [each for each in command if each != "-F"]).output.splitlines():
            on_line(line)
        if "-F" in command:
            stop.wait(5)
        return 0

    def send(self, ssh: Ssh, host: Host, command: Sequence[str], file: Path) -> None:
        assert self.run(ssh, host, command, stdin=file.read_bytes()).exit_code == 0

    @contextmanager
    def receive(self, _: Ssh, host: Host, command: Sequence[str]) -> Iterator[IO[bytes]]:
        del host
        yield io.BytesIO(subprocess.run(command, capture_output=True, env=self.environment, check=True).stdout)

    def end(self, state: str, code: str) -> None:
        (self.folder / "state").write_text(f"{state} {code}\n")


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    found = Login(tmp_path / "site")
    for name in ("run", "stream", "send", "receive"):
        method = getattr(found, name)
        monkeypatch.setattr(Ssh, name, lambda self, *words, _method=method, **more: _method(self, *words, **more))
    # rsync would start the real SSH.
    monkeypatch.setattr("mixtral_run.fleet.jobs.fetch.why_not_here", lambda: "a stand-in has no rsync")
    for module in (follow, launcher):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return found


def run(*words: str) -> None:
    root.main(list(words), standalone_mode=False, prog_name="mixtral-run")


def submit(tmp_path: Path, *more: str) -> Path:
    """Submit a job with a data file of this machine, and return its folder on the site."""
    data = tmp_path / "my data.jsonl"
    data.write_text('{"instruction": "a", "response": "b"}\n')
    run(
        "finetune", "--load", "mixtral", "--save", f"{tmp_path}/out/adapter", "--data-path", str(data), "--launcher",
        "slurm", "--login", "me@login.example.com", *more,
    )  # fmt: skip
    return Path(read_records()[0].extra["folder"])


def test_a_job_is_submitted_on_the_login_node_with_its_files(login: Login, tmp_path: Path) -> None:
    folder = submit(tmp_path, "--detach")
    record = read_records()[0]
    assert folder == login.folder / ".local/state/mixtral-run/jobs" / record.name
    assert record.scheduler_id == "5" and record.output == f"{tmp_path}/out/adapter"
    assert {each.name for each in folder.iterdir()} == {"config.json", "job.sh", "log.txt", "data_path.jsonl"}
    assert (folder / "data_path.jsonl").read_text() == (tmp_path / "my data.jsonl").read_text()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {host.target for host in login.asked} == {"me@login.example.com"}


def test_its_output_is_followed_and_its_end_is_that_of_the_command(
    login: Login, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(tmp_path, "--detach")
    name = read_records()[0].name
    for state, code, error in (
        ("COMPLETED", "0:0", None),
        ("FAILED", "5:0", WeightsError),
        ("FAILED", "143:0", Stopped),
        ("CANCELLED", "0:15", Stopped),
        ("TIMEOUT", "0:1", MixtralRunError),
        ("FORGOTTEN", "", MixtralRunError),
    ):
        login.end(state, code)
        capsys.readouterr()
        if error is None:
            run("logs", "-f", name)
        else:
            with pytest.raises(error):
                run("logs", "-f", name)
        assert capsys.readouterr().out == "one\ntwo\n"
    (Path(read_records()[0].extra["folder"]) / "outcome").write_text("0\n")
    run("logs", "-f", name)


def test_it_is_listed_stopped_and_fetched(login: Login, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = submit(tmp_path, "--detach")
    run("logs", "finetune", "--tail", "1")
    assert capsys.readouterr().out == "two\n"
    (folder / "log.txt").rename(folder / "elsewhere")
    with pytest.raises(HostError, match=r"output of finetune-.* cannot be read"):
        run("logs", "finetune")
    (folder / "elsewhere").rename(folder / "log.txt")
    run("jobs")
    assert "running" in capsys.readouterr().out
    run("stop", "finetune")
    assert (folder / "stopped").exists()
    assert (login.folder / "canceled").read_text() == "--signal=TERM 5\n"
    (tmp_path / "out/adapter").mkdir(parents=True)
    (tmp_path / "out/adapter/weights").write_text("w")
    (tmp_path / "here").mkdir()
    run("fetch", "finetune", str(tmp_path / "here"))
    assert (tmp_path / "here/adapter/weights").read_text() == "w"


def test_a_job_that_waits_is_canceled(login: Login, tmp_path: Path) -> None:
    submit(tmp_path, "--detach")
    login.end("PENDING", "0:0")
    run("stop", "finetune")
    assert (login.folder / "canceled").read_text() == "5\n"


def test_a_controller_that_does_not_answer_is_no_end_of_the_job(
    login: Login, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(tmp_path, "--detach")
    (login.folder / "down").touch()
    with pytest.raises(HostError, match="jobs of some hosts or schedulers are unknown") as caught:
        run("jobs")
    assert "Unable to contact slurm controller" in str(caught.value)
    with pytest.raises(HostError):
        run("stop", "finetune")
    capsys.readouterr()


def test_a_refused_job_leaves_nothing(login: Login, tmp_path: Path) -> None:
    (login.folder / "refuses").touch()
    with pytest.raises(HostError, match="Slurm refuses the job") as caught:
        submit(tmp_path)
    assert "no account" in str(caught.value)
    assert read_records() == []
    assert list((login.folder / ".local/state/mixtral-run/jobs").iterdir()) == []


def test_a_machine_without_slurm_is_named(tmp_path: Path, login: Login) -> None:
    for name in ("sbatch", "scontrol"):
        (login.folder / "bin" / name).unlink()
    with pytest.raises(HostError, match=r"Slurm.s commands are not on login\.example\.com") as caught:
        submit(tmp_path)
    assert "--login NODE" in str(caught.value)

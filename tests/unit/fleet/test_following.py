"""Following a job on several hosts whose connections, containers or readers fail."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import pytest

from mixtral_run.errors import HostError
from mixtral_run.fleet import job_log
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.job_log import JobFollower
from mixtral_run.fleet.jobs import JobRow, RunningJob
from mixtral_run.fleet.ssh import Answer, Ssh

HOSTS = (parse_host("gpu-01"), parse_host("gpu-02"))
State = tuple[list[JobRow], list[HostError]]


def running(host: Host) -> State:
    return [JobRow("job", "finetune", host, "running", 0, False, "", "", 2)], []


def ended(host: Host, exit_code: int = 0) -> State:
    return [JobRow("job", "finetune", host, "exited", exit_code, False, "", "", 2)], []


def silent(host: Host) -> State:
    return [], [HostError(f"{host.name} does not answer.")]


def gone(host: Host) -> State:
    del host
    return [], []


class Fleet(Ssh):
    """STAND-IN for hosts behind SSH: each log is one line, each question about the job takes the host's next answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Sequence[Callable[[Host], State]]) -> None:
        super().__init__()
        self.answers = {host: list(each) for host, each in zip(HOSTS, answers, strict=False)}
        self.stopped: list[str] = []
        self.said: list[str] = []
        self.job = RunningJob("job", "finetune", HOSTS[: len(answers)])
        monkeypatch.setattr(job_log, "RECONNECT_SECONDS", 0.01)
        monkeypatch.setattr(job_log, "list_jobs", lambda hosts, _: self._next(hosts[0]))

    def _next(self, host: Host) -> State:
        answers = self.answers[host]
        return (answers.pop(0) if len(answers) > 1 else answers[0])(host)

    def stream(self, host: Host, command: Sequence[str], on_line: Callable[[str], None], *_: object) -> int:
        del command
        on_line(f"2026-01-01T00:00:00.000000001Z {host.name} is at work")
        return 255

    def run(self, host: Host, command: Sequence[str], **_: object) -> Answer:  # type: ignore[override]
        assert "stop" in command
        self.stopped.append(host.name)
        return Answer(0, "", "")

    def follow(self, out: io.StringIO | None = None) -> None:
        JobFollower(self.job, self, out or io.StringIO(), say=self.said.append).follow()


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_left_is_told_and_not_taken_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, [running], [running])
    with pytest.raises(BrokenPipeError):
        fleet.follow(ClosedPipe())
    assert fleet.stopped == []

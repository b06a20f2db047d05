"""Live output of a job on several hosts whose connections, containers or readers fail."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import pytest

from mixtral_run.errors import HostError, MixtralRunError, Stopped, TrainingError
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs import job_log
from mixtral_run.fleet.jobs.job_log import JobFollower
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob
from mixtral_run.fleet.ssh.connection import Answer, Ssh

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
    """STAND-IN for hosts behind SSH: each log has one line; each query for the job takes the host's next answer."""

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


def test_a_reader_that_left_is_reported_and_not_taken_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, [running], [running])
    with pytest.raises(BrokenPipeError):
        fleet.follow(ClosedPipe())
    assert fleet.stopped == []


def test_hosts_that_do_not_answer_for_a_while_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, [silent] * 20 + [ended], [running, *[silent] * 20, ended])
    fleet.follow()
    assert fleet.stopped == []
    for host in ("gpu-01", "gpu-02"):
        reported = [line for line in fleet.said if host in line]
        assert len(reported) == 2
        assert "does not answer" in reported[0]
        assert "answers again" in reported[1]


def test_a_host_that_never_answers_again_is_lost_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "PATIENCE_SECONDS", 0.05)
    fleet = Fleet(monkeypatch, [silent], [*[running] * 50, ended])
    with pytest.raises(HostError, match="was lost: gpu-01"):
        fleet.follow()
    assert fleet.stopped == []
    assert fleet.answers[HOSTS[1]] == [ended]


def test_a_job_without_output_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    Fleet(monkeypatch, [*[running] * 50, ended]).follow()


@pytest.mark.parametrize(("end", "how"), [(lambda host: ended(host, 6), "exit code 6"), (gone, "no container")])
def test_a_part_that_failed_stops_the_others(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[Host], State], how: str
) -> None:
    fleet = Fleet(monkeypatch, [end], [lambda host: ended(host, 143) if fleet.stopped else running(host)])
    with pytest.raises(MixtralRunError, match=r"failed on gpu-01|was lost: gpu-01"):
        fleet.follow()
    assert fleet.stopped == ["gpu-02"]
    assert how in fleet.said[0]


def test_a_part_that_was_stopped_leaves_the_others_their_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Callable[[Host], State]] = [*[running] * 50, lambda host: ended(host, 143)]
    fleet = Fleet(monkeypatch, [lambda host: ended(host, 143)], others)
    with pytest.raises(Stopped):
        fleet.follow()
    assert fleet.stopped == []


def test_of_a_job_that_was_stopped_the_part_that_was_killed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, [lambda host: ended(host, 143)], [*[running] * 10, lambda host: ended(host, 137)])
    with pytest.raises(TrainingError, match="gpu-02"):
        fleet.follow()

"""Logs of a job that are shown or followed: what is asked, said and raised."""

from __future__ import annotations

import collections
import dataclasses
import io
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.errors import HostError, Stopped
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs import interactive, job_log, run_on_hosts
from mixtral_run.fleet.jobs import serve as serving
from mixtral_run.fleet.jobs.job_log import JobFollower, _HostLog
from mixtral_run.fleet.jobs.jobs import ENGINE_SCRIPT, RunningJob
from tests.unit.fleet.jobs.test_job_parts import HOSTS, JOB, STAMP, follower, row


class Flushed(io.StringIO):
    """A stream that counts how often it was flushed."""

    count = 0

    def flush(self) -> None:
        self.count += 1


def test_what_is_said_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for say in (interactive._say, run_on_hosts._say, serving._say):
        monkeypatch.setattr(sys, "stderr", err := Flushed())
        say("text")
        assert (err.getvalue(), err.count) == ("text\n", 1)
    monkeypatch.setattr(sys, "stderr", err := Flushed())
    monkeypatch.setattr(sys, "stdout", out := Flushed())
    found = JobFollower(RunningJob("j", "v", HOSTS[:1]), MagicMock())
    assert (found.out, found.err) == (out, err)
    found.say("text")
    assert (err.getvalue(), err.count, out.getvalue()) == ("text\n", 1, "")
    found._line(found._logs[0], "line", MagicMock(), out)
    assert (out.getvalue(), out.count) == ("line\n", 1)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_log_so_far_is_asked_of_each_host(number: int) -> None:
    asked: list[Any] = []

    def stream(host: Host, words: list[str], on_line: Any, stop: Any, on_error_line: Any) -> None:
        asked.append((host.name, words, stop))
        on_line("text")
        on_error_line("error")

    ssh: Any = SimpleNamespace(stream=stream)
    out, err = Flushed(), Flushed()
    rows = [row(host) for host in HOSTS[:number]]
    job_log.show_logs(rows, ssh, out, err=err)
    words = ["sh", "-c", ENGINE_SCRIPT, "docker", "logs", "--tail", "all", "job"]
    assert asked == [(host.name, words, None) for host in HOSTS[:number]]
    shown = {1: "text\n", 2: "gpu-1  | text\ngpu-22 | text\n", 3: "gpu-1  | text\ngpu-22 | text\ngpu-3  | text\n"}
    assert out.getvalue() == shown[number] and err.getvalue() == shown[number].replace("text", "error")
    assert (out.count, err.count) == (number, number)
    job_log.show_logs(rows[:1], ssh, out, tail="7", err=err)
    assert asked[-1][1][-2:] == ["7", "job"]


def test_one_pipe_keeps_the_order_where_both_go_to_one_place(tmp_path: Path) -> None:
    calls: list[Any] = []
    ssh: Any = SimpleNamespace(stream=lambda *given: calls.append(given))
    with (tmp_path / "a").open("w") as one, (tmp_path / "b").open("w") as two:
        for err in (one, two):
            job_log._stream_apart(ssh, HOSTS[0], ["x"], one, err, lambda *_: None)
        assert [job_log._same_place(one, each) for each in (one, two)] == [True, False]
    assert [each[4] is None for each in calls] == [True, False] and calls[0][3] is None
    assert not job_log._same_place(io.StringIO(), io.StringIO()) and not job_log._same_place(one, two)
    missing: Any = SimpleNamespace(fileno=lambda: 10**6)
    assert not job_log._same_place(missing, missing)


@pytest.mark.parametrize("length", [20, 21, 22])
def test_the_length_of_a_time_stamp(length: int) -> None:
    stamp = "2026-" + "0" * (length - 6) + "Z"
    found, _ = follower()
    found._line(found._logs[0], f"{stamp} x", MagicMock(__getitem__=lambda *_: 0), found.out)
    assert found.out.getvalue() == ("x\n" if length > 20 else f"{stamp} x\n")  # type: ignore[attr-defined]


def test_a_log_begins_with_nothing() -> None:
    log = _HostLog(HOSTS[0])
    assert (log.lost, log.cut_off, log.removed, log.problem, log.ended) == (
        False,
        False,
        False,
        None,
        0.0,
    )
    assert not log.over and log.bad and not log.stopped
    for name in ("lost", "cut_off", "removed"):
        each = _HostLog(HOSTS[0])
        setattr(each, name, True)
        assert each.over and each.bad and not each.stopped
    ends = {code: _HostLog(HOSTS[0], row=row(code=code)) for code in (-1, 0, 1, 130, 143)}
    assert all(each.over for each in ends.values())
    assert {code: (each.bad, each.stopped) for code, each in ends.items()} == {
        -1: (True, False), 0: (False, False), 1: (True, False), 130: (True, True), 143: (True, True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("new_only", "shown", "options"),
    [(False, False, []), (True, False, ["--tail", "0"]), (True, True, ["--since", STAMP])],
)
def test_how_a_log_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, new_only: bool, shown: bool, options: list[str]
) -> None:
    """A container that still runs is asked again after a pause; one that has ended once more, for its last lines."""
    found, _ = follower()
    (log,) = found._logs
    if shown:
        log.shown.append((STAMP, "x"))
    asked: list[Any] = []
    waits: list[float] = []
    rows = [row(state="running"), row(code=5)]
    monkeypatch.setattr(job_log, "_stream_apart", lambda *given: asked.append(given[2]))
    monkeypatch.setattr(job_log, "time", SimpleNamespace(monotonic=lambda: 7.0))
    monkeypatch.setattr(found, "_row_of", lambda _: rows.pop(0))
    monkeypatch.setattr(found._leave, "wait", waits.append)
    found._follow_host(log, new_only)
    start = ["sh", "-c", ENGINE_SCRIPT, "docker", "logs", "--timestamps"]
    assert asked == [[*start, "--follow", *options, "job"]] * 2 + [[*start, *options, "job"]]
    assert waits == [2.0] and log.row == row(code=5) and log.ended == 7.0
    # A host that is lost, or a container that is gone, has no row and no last lines.
    asked.clear()
    log.row, rows[:] = None, [None]  # type: ignore[list-item]
    found._follow_host(log, new_only)
    assert len(asked) == 1 and log.row is None and log.ended == 7.0
    found._leave.set()
    found._follow_host(log, new_only)
    assert len(asked) == 1


@pytest.mark.parametrize(("number", "addresses", "watched"), [(1, True, 0), (2, True, 1), (2, False, 0)])
def test_the_threads_of_a_follower(monkeypatch: pytest.MonkeyPatch, number: int, addresses: bool, watched: int) -> None:
    found, _ = follower(number)
    if not addresses:
        found.job = dataclasses.replace(found.job, addresses={})
    made: list[Any] = []

    class Thread(threading.Thread):
        def __init__(self, **given: Any) -> None:
            made.append(given)
            super().__init__(**given)

    followed: list[Any] = []

    def end(log: Any, new_only: bool) -> None:
        followed.append((log.host.name, new_only))
        log.row = row()

    monkeypatch.setattr(job_log.threading, "Thread", Thread)
    monkeypatch.setattr(job_log, "watch_hosts", lambda *_: None)
    monkeypatch.setattr(found, "_follow_host", end)
    found.follow()
    assert sorted(followed) == [(host.name, False) for host in HOSTS[:number]]
    assert all(each["daemon"] is True for each in made)
    assert [each["name"] for each in made] == [host.name for host in HOSTS[:number]] + ["hosts"] * watched
    assert found._leave.is_set()


def test_who_is_alive_and_who_is_cut_off() -> None:
    found, _ = follower(3)
    found._logs[0].row = row()
    assert found._alive() == [HOSTS[1], HOSTS[2]]
    found._cut_off(HOSTS[2])
    assert [log.cut_off for log in found._logs] == [False, False, True] and found._alive() == [HOSTS[1]]


def test_a_host_that_answers_again_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [([], [HostError("gone.")]), ([], [HostError("gone.")]), ([row()], [])]
    monkeypatch.setattr(job_log, "list_jobs", lambda *_: answers.pop(0))
    found, said = follower()
    monkeypatch.setattr(found._leave, "wait", lambda _: False)
    assert found._row_of(found._logs[0]) == row()
    assert said == ["! gone. job may continue there; retrying for 10 minutes", "gpu-1 answers again"]
    assert not found._logs[0].removed and not found._logs[0].lost
    found._leave.set()
    assert found._row_of(found._logs[0]) is None and not found._logs[0].lost
    said.clear()
    answers[:] = [([row()], [])]
    found._leave.clear()
    assert found._row_of(found._logs[0]) == row() and said == []


def test_who_has_failed_of_several() -> None:
    """The end of a container that was not asked to end comes before that of one that was."""
    found, _ = follower(3)
    for log in found._logs:
        log.row = row(log.host)
    found._logs[2].row = row(HOSTS[2], code=3)
    with pytest.raises(HostError, match="job failed on gpu-3"):
        found._raise_if_bad()
    for at, code in ((0, 143), (1, 130)):
        found._logs[at].row, found._logs[at].ended = row(HOSTS[at], code=code), float(at)
    found._logs[2].ended = 99.0
    with pytest.raises(HostError, match="job failed on gpu-3"):
        found._raise_if_bad()
    found._logs[2].row = row(HOSTS[2])
    with pytest.raises(Stopped, match="gpu-1"):
        found._raise_if_bad()


@pytest.mark.parametrize("verb", ["finetune", "align", "pretrain"])
def test_what_continues_a_stopped_job(verb: str) -> None:
    error = job_log.job_error(RunningJob("job", verb, HOSTS), HOSTS[0], row(code=130), [])
    assert error.where == "gpu-1" and error.what == "job was stopped on gpu-1."
    assert error.next_command == (
        "mixtral-run logs job"
        if verb == "pretrain"
        else "the same command with --resume continues from the last checkpoint"
    )


def test_a_known_failure_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "record_failures", lambda _: None)
    error = job_log.job_error(JOB, HOSTS[0], row(code=1), ["CUDA out of memory."])
    assert len(error.problems) == 1 and error.problems[0].startswith("A GPU's memory is full")
    plain = job_log.job_error(JOB, HOSTS[0], row(code=1), ["x"])
    assert (plain.problems, plain.next_command, plain.where) == ((), "mixtral-run logs job", "gpu-1")
    lost = job_log.job_error(JOB, HOSTS[0], None, [])
    assert (lost.where, lost.next_command) == ("gpu-1", "mixtral-run jobs; mixtral-run logs job")


def test_lines_that_were_shown_are_left_out_as_often_as_they_were() -> None:
    found, _ = follower()
    (log,) = found._logs
    again = collections.Counter({(STAMP, "x"): 3})
    for number in range(5):
        assert len(log.shown) == max(number - 3, 0)
        found._line(log, f"{STAMP} x", again, found.out)
    assert found.out.getvalue() == "x\nx\n" and len(log.shown) == 2  # type: ignore[attr-defined]

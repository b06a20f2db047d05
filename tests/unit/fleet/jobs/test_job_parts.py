"""Parts of jobs by themselves: lines of a log, rows of a list, whose end is the cause, and who counts as lost."""

from __future__ import annotations

import collections
import io
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.errors import ConfigError, HostError, MixtralRunError, Stopped, TrainingError
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs import job_log, jobs, lost_hosts, run_on_hosts
from mixtral_run.fleet.jobs.job_log import JobFollower, _HostLog, job_error
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob, find_whole_job
from mixtral_run.fleet.jobs.lost_hosts import HostLost, HostWatch
from mixtral_run.fleet.ssh.connection import Answer

HOSTS = tuple(map(parse_host, ("gpu-1", "gpu-22", "gpu-3")))
JOB = RunningJob("job", "finetune", HOSTS, {host.name: f"10.0.0.{n}" for n, host in enumerate(HOSTS)})


def row(host: Host = HOSTS[0], state: str = "exited", code: int = 0, **values: Any) -> JobRow:
    given = {"job": "job", "verb": "finetune", "out_of_memory": False, "since": "", "output": "", **values}
    return JobRow(host=host, state=state, exit_code=code, **given)


def follower(num_hosts: int = 1) -> tuple[JobFollower, list[str]]:
    said: list[str] = []
    job = RunningJob("job", "finetune", HOSTS[:num_hosts], JOB.addresses)
    return JobFollower(job, MagicMock(), io.StringIO(), said.append, io.StringIO()), said


STAMP = "2026-01-01T00:00:00.000000001Z"


@pytest.mark.parametrize(
    ("line", "text", "is_log"),
    [
        (f"{STAMP} a b ", "a b ", True),
        (f"{STAMP} ", "", True),
        ("2026-01-01T00:00:0001Z x", "x", True),
        ("2026-01-01T00:00:00Z x", "2026-01-01T00:00:00Z x", False),  # 20 characters
        (f"{STAMP[:-1]} x", f"{STAMP[:-1]} x", False),
        (f"2026/{STAMP[5:]} x", f"2026/{STAMP[5:]} x", False),
        ("Connection reset", "Connection reset", False),
    ],
)
def test_a_line_of_the_log_has_a_time_stamp(line: str, text: str, is_log: bool) -> None:
    found, _ = follower()
    (log,) = found._logs
    again = collections.Counter({(STAMP, "again"): 1})
    found._line(log, line, again, found.out)
    assert found.out.getvalue() == f"{text}\n" and list(log.lines) == [text]  # type: ignore[attr-defined]
    assert len(log.shown) == int(is_log)
    # What was shown before the connection broke is not shown a second time, unless it was there twice.
    for _ in range(2):
        found._line(log, f"{STAMP} again", again, found.err)
    assert found.err.getvalue() == "again\n" and again[STAMP, "again"] == 0  # type: ignore[attr-defined]


def test_logs_are_asked_for_from_some_lines_before_the_last() -> None:
    log = _HostLog(HOSTS[0])
    assert job_log._since(log) == []
    log.shown.extend((f"{number:03d}", "x") for number in range(100, 160))
    assert job_log._since(log) == ["--since", "110"]
    log.shown.append(("050", "out of order"))
    assert job_log._since(log) == ["--since", "050"]
    assert (log.shown.maxlen, log.lines.maxlen) == (400, 400)
    assert (job_log.OVERLAP_LINES, job_log.PATIENCE_SECONDS, job_log.RECONNECT_SECONDS) == (50, 600, 2.0)
    assert (job_log.GRACE_SECONDS, job_log.LOST_GRACE_SECONDS) == (30, 5)


def test_each_line_has_the_name_of_its_host() -> None:
    assert job_log._prefixed(HOSTS[0], 6, "a\nb") == "gpu-1  | a\ngpu-1  | b"
    assert job_log._prefixed(HOSTS[0], 0, "a\nb") == "a\nb"
    assert [follower(number)[0]._width for number in (1, 2, 3)] == [0, 6, 6]


@pytest.mark.parametrize(
    ("logs", "stopped", "grace", "how"),
    [
        ([{"row": row(code=6)}, {}], ["gpu-22"], 30, "ended with exit code 6"),
        ([{"removed": True}, {}], ["gpu-22"], 30, "has no container of the job"),
        ([{"cut_off": True}, {}], ["gpu-22"], 5, "is lost: neither this machine nor the other hosts reach it"),
        ([{"row": row(code=6)}, {"cut_off": True}, {}], ["gpu-3"], 30, "ended with exit code 6"),
        (
            [{"cut_off": True}, {"row": row(code=6)}, {}],
            ["gpu-3"],
            5,
            "is lost: neither this machine nor the other hosts reach it",
        ),
        ([{"row": row(code=0)}, {}], None, 0, ""),
        ([{"lost": True}, {}], None, 0, ""),
        ([{"row": row(code=130)}, {}], None, 0, ""),
        ([{"row": row(code=143)}, {}], None, 0, ""),
        ([{"row": row(code=6)}, {"row": row(code=6)}], None, 0, ""),
        ([{}, {}], None, 0, ""),
    ],
)
def test_the_others_are_stopped_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, logs: list[dict[str, Any]], stopped: list[str] | None, grace: int, how: str
) -> None:
    found, said = follower(len(logs))
    for log, values in zip(found._logs, logs, strict=True):
        for name, value in values.items():
            setattr(log, name, value)
    asked: list[Any] = []
    monkeypatch.setattr(job_log, "engine", lambda _, host, *words, **more: asked.append((host.name, words, more)))
    found.ssh.each = lambda hosts, work: [work(host) for host in hosts]  # type: ignore[method-assign]
    monkeypatch.setattr(
        job_log.threading, "Thread", lambda target, daemon: SimpleNamespace(start=target if daemon else None)
    )
    found._watch()
    found._watch()  # once alone
    if stopped is None:
        assert asked == [] and said == []
    else:
        words = ("stop", "--time", str(grace), "job")
        assert asked == [(name, words, {"timeout_seconds": grace + 30}) for name in stopped]
        assert said == [f"✗ gpu-1 {how}: stopping the job on {', '.join(stopped)}"]


def test_the_first_end_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[Any] = []
    monkeypatch.setattr(job_log, "job_error", lambda _, host, __, lines: named.append((host.name, lines)) or ValueError)
    found, _ = follower(3)
    first, second, third = found._logs
    for log, code, ended in ((first, 143, 1.0), (second, 6, 3.0), (third, 6, 2.0)):
        log.row, log.ended = row(log.host, code=code), ended
        log.lines.append(log.host.name)
    with pytest.raises(ValueError):
        found._raise_if_bad()
    assert named == [("gpu-3", ["gpu-3"])]
    second.cut_off = True
    with pytest.raises(HostLost, match="gpu-22 is lost"):
        found._raise_if_bad()
    third.problem = BrokenPipeError()
    with pytest.raises(BrokenPipeError):
        found._raise_if_bad()
    good, _ = follower(2)
    for log in good._logs:
        log.row = row()
    good._raise_if_bad()


@pytest.mark.parametrize(
    ("given", "kind", "found"),
    [
        (row(code=1), TrainingError, "exit code 1"),
        (row(code=2), ConfigError, "exit code 2"),
        (row(code=3), HostError, "exit code 3"),
        (row(code=99), TrainingError, "exit code 99"),
        (row(code=137), TrainingError, "exit code 137: killed, by a user or because memory ran out"),
        (row(code=9, out_of_memory=True), TrainingError, "exit code 9: killed, by a user or because memory ran out"),
    ],
)
def test_the_error_of_a_job(
    monkeypatch: pytest.MonkeyPatch, given: JobRow, kind: type[MixtralRunError], found: str
) -> None:
    recorded: list[dict[str, str]] = []
    monkeypatch.setattr(job_log, "record_failures", recorded.append)
    lines = [f"line {number}" for number in range(70)] + [" "]
    error = job_error(JOB, HOSTS[0], given, lines)
    assert type(error) is kind and error.found == found and error.what == "job failed on gpu-1."
    kept = lines[10:70] if not given.out_of_memory else [*lines[11:70], "killed (SIGKILL): the memory was full"]
    assert recorded == [dict.fromkeys(("job", "gpu-1"), "\n".join(kept))]
    serving = job_error(RunningJob("job", "serve", HOSTS[:1]), HOSTS[0], given, [])
    assert type(serving) is HostError


def test_the_end_of_a_job_that_was_stopped_or_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "record_failures", lambda _: None)
    for code in (130, 143):
        error = job_error(JOB, HOSTS[0], row(code=code), [])
        assert type(error) is Stopped and "--resume continues" in str(error.next_command)
    other = job_error(RunningJob("job", "convert", HOSTS), HOSTS[0], row(code=143), [])
    assert other.next_command == "mixtral-run logs job"
    lost = job_error(JOB, HOSTS[0], None, [])
    assert type(lost) is HostError and lost.what.startswith("job was lost: gpu-1 cannot be reached")


def test_a_host_is_asked_about_until_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two seconds, 600 seconds long, with one line about it."""
    now, waits = [1000.0], []
    monkeypatch.setattr(job_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(job_log, "list_jobs", lambda *_: ([], [HostError("gpu-1 does not answer.")]))
    found, said = follower()

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        now[0] += seconds
        return False

    monkeypatch.setattr(found._leave, "wait", wait)
    assert found._row_of(found._logs[0]) is None
    assert found._logs[0].lost and not found._logs[0].removed and waits == [2.0] * 300
    assert said == ["! gpu-1 does not answer. job may continue there; retrying for 10 minutes"]
    # Another job of the host is not this one: the container is gone.
    monkeypatch.setattr(job_log, "list_jobs", lambda *_: ([row(job="job2")], [HostError("odd")][:0]))
    assert found._row_of(found._logs[0]) is None and found._logs[0].removed
    monkeypatch.setattr(job_log, "list_jobs", lambda *_: ([row(job="job2"), row()], [HostError("odd")]))
    assert found._row_of(found._logs[0]) == row() and not found._logs[0].removed


class Network:
    """STAND-IN for SSH: exit codes by host, and what a host says that is asked to reach another one."""

    def __init__(self, codes: dict[str, int], reach: Answer) -> None:
        self.codes, self.reach, self.asked = codes, reach, list[Any]()

    def each(self, hosts: list[Host], work: Any) -> list[Any]:
        return [work(host) for host in hosts]

    def run(self, host: Host, command: list[str], timeout_seconds: float) -> Answer:
        if command == ["true"]:
            assert timeout_seconds == 10.0
            return Answer(self.codes[host.name], "", "")
        self.asked.append((host.name, command[-2:], timeout_seconds))
        return self.reach


@pytest.mark.parametrize(
    ("code", "seconds", "reach", "lost"),
    [
        (255, 15.0, Answer(1, "", "No route to host"), True),
        (124, 15.0, Answer(124, "", ""), True),
        (255, 14.9, Answer(1, "", "No route to host"), False),
        (1, 99.0, Answer(1, "", "No route to host"), False),
        (255, 15.0, Answer(0, "", ""), False),
        (255, 15.0, Answer(255, "", ""), False),
        (255, 15.0, Answer(1, "", "Connection REFUSED"), False),
    ],
)
def test_a_host_is_lost_after_some_time_if_another_does_not_reach_it(
    monkeypatch: pytest.MonkeyPatch, code: int, seconds: float, reach: Answer, lost: bool
) -> None:
    now = [100.0]
    monkeypatch.setattr(lost_hosts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    network: Any = Network({"gpu-1": 0, "gpu-22": code, "gpu-3": 0}, reach)
    watch = HostWatch(JOB, network)
    assert watch.look(HOSTS) == []
    now[0] += seconds
    assert watch.look(HOSTS) == ([HOSTS[1]] if lost else [])
    assert all(each == ("gpu-1", ["10.0.0.1", "22"], 20.0) for each in network.asked)
    # A host whose container has ended is not asked about any more.
    assert watch.look(HOSTS[:1]) == []
    assert (lost_hosts.PROBE_SECONDS, lost_hosts.NO_ANSWER) == (5.0, (124, 255))


def test_hosts_are_looked_at_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(HostWatch, "look", lambda _, hosts: looked.append(tuple(hosts)) or [HOSTS[2]])
    answers, alive, lost = [False, False, True], [HOSTS[:2], ()], list[Host]()
    lost_hosts.watch_hosts(JOB, MagicMock(), lambda: alive.pop(0), lost.append, lambda _: answers.pop(0))
    assert looked == [HOSTS[:2]] and lost == [HOSTS[2]] and alive == []


CELLS = ["job", "finetune", "running", "0", "false", "2026-01-01T00:00:00.123456Z", "/out", "2"]


@pytest.mark.parametrize(
    ("at", "value", "field", "expected"),
    [
        (3, "-1", "exit_code", -1),
        (4, "true", "out_of_memory", True),
        (5, CELLS[5], "since", "2026-01-01T00:00:00"),
        (6, "", "output", ""),
        (6, "s3://b/x", "output", "s3://b/x"),
        (7, "", "num_hosts", 1),
        (7, "12", "num_hosts", 12),
        (2, "paused", "running", True),
        (2, "created", "running", True),
        (2, "restarting", "running", True),
        (2, "dead", "running", False),
        (7, "<no value>", "num_hosts", 1),
        (3, "x", None, None),
        (4, "maybe", None, None),
        (0, "-job", None, None),
        (0, "j" * 129, None, None),
        (6, "relative", None, None),
        (7, "123456", None, None),
    ],
)
def test_a_row_of_the_list(at: int, value: str, field: str | None, expected: object) -> None:
    line = "\t".join([*CELLS[:at], value, *CELLS[at + 1 :]])
    if field is None:
        with pytest.raises(ValueError):
            jobs._row(HOSTS[0], line)
    else:
        assert getattr(jobs._row(HOSTS[0], line), field) == expected


@pytest.mark.parametrize(
    ("answer", "num_rows", "problem"),
    [
        (Answer(0, "\t".join(CELLS) + "\n", ""), 1, None),
        (Answer(1, "\t".join(CELLS), "Error: No Such Object: x"), 1, None),
        (Answer(1, "\t".join(CELLS), "Cannot connect"), 0, "does not report its jobs"),
        (Answer(255, "", "Connection refused"), 0, "refuses the connection"),
        (Answer(0, "odd\n" + "\t".join(CELLS) + "\nodd2", ""), 1, "does not report all its jobs"),
    ],
)
def test_the_list_of_a_host(answer: Answer, num_rows: int, problem: str | None) -> None:
    ssh: Any = SimpleNamespace(run=lambda *_: answer)
    rows, error = jobs._rows_of(ssh, HOSTS[0])
    assert len(rows) == num_rows and (error is None) == (problem is None)
    assert error is None or problem in error.what  # type: ignore[operator]
    if answer.output.startswith("odd"):
        assert error is not None and error.found == "odd"


def test_a_job_is_found_by_its_name_or_the_start_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(HOSTS[1], "running", job="aa-1", num_hosts=2), row(HOSTS[0], job="aa-1", num_hosts=2),
            row(HOSTS[0], job="aa-12"), row(HOSTS[2], job="b")]  # fmt: skip
    errors: list[HostError] = []
    monkeypatch.setattr(jobs, "list_jobs", lambda *_: (rows, errors))
    found, missing = find_whole_job("aa-1", HOSTS)
    assert ([each.host.name for each in found], missing) == (["gpu-1", "gpu-22"], [])
    assert [each.job for each in find_whole_job("b", HOSTS)[0]] == ["b"]
    with pytest.raises(ConfigError, match="Several jobs are called 'aa'") as several:
        find_whole_job("aa", HOSTS)
    assert several.value.found == "aa-1, aa-12"
    assert [each.job for each in find_whole_job("aa", HOSTS, prefer_running=True)[0]] == ["aa-1"] * 2
    with pytest.raises(ConfigError, match="No job is called 'c'") as none:
        find_whole_job("c", HOSTS)
    assert none.value.found == "aa-1, aa-1, aa-12, b"
    errors.append(HostError("gpu-3 does not answer."))
    assert find_whole_job("aa-1", HOSTS)[1] == []
    rows[0], rows[1] = (row(each.host, each.state, job="aa-1", num_hosts=3) for each in rows[:2])
    assert find_whole_job("aa-1", HOSTS)[1] == errors
    with pytest.raises(HostError, match="gpu-3 does not answer"):
        find_whole_job("c", HOSTS)
    errors.append(HostError("gpu-22 does not answer."))
    with pytest.raises(HostError, match="No job is called 'c' on the hosts that answer"):
        find_whole_job("c", HOSTS)
    rows.clear()
    errors.clear()
    with pytest.raises(ConfigError) as empty:
        find_whole_job("c", HOSTS)
    assert empty.value.found == "no jobs"


def test_a_job_is_stopped_with_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    answers = [Answer(0, "", ""), Answer(0, "", "")]

    def engine(_: object, host: Host, *words: str, timeout_seconds: float) -> Answer:
        asked.append((host.name, words, timeout_seconds))
        return answers[len(asked) - 1]

    monkeypatch.setattr(jobs, "engine", engine)
    monkeypatch.setattr(jobs, "list_jobs", lambda *_: ([row(code=143), row(job="other")], []))
    ssh: Any = SimpleNamespace(each=lambda hosts, work: [work(host) for host in hosts])
    assert jobs.stop([row(HOSTS[0]), row(HOSTS[1])], ssh) == [row(code=143)]
    words = ("stop", "--time", "330", "job")
    assert asked == [("gpu-1", words, 390), ("gpu-22", words, 390)]
    asked.clear()
    answers[1] = Answer(1, "", "first\nlast\n")
    with pytest.raises(HostError, match="could not be stopped everywhere") as caught:
        jobs.stop([row(HOSTS[0]), row(HOSTS[1])], ssh)
    assert caught.value.problems == ("gpu-22: last",)


@pytest.mark.parametrize(
    ("error", "least", "left"),
    [
        ("lost", 2, ("gpu-1", "gpu-3")),
        ("lost", 1, ("gpu-1", "gpu-3")),
        ("lost", 3, None),
        ("lost", None, None),
        ("failed", None, ("gpu-1", "gpu-22", "gpu-3")),
        ("stopped", 1, None),
    ],
)
def test_the_hosts_that_a_job_starts_again_on(error: str, least: int | None, left: tuple[str, ...] | None) -> None:
    errors = {"lost": HostLost(JOB, HOSTS[1]), "failed": TrainingError("x"), "stopped": Stopped("x")}
    options: Any = SimpleNamespace(min_hosts=least, inventory=None)
    assert run_on_hosts._hosts_left(JOB, options, errors[error]) == left
    alone = RunningJob("job", "finetune", HOSTS[:1])
    assert run_on_hosts._hosts_left(alone, options, TrainingError("x")) is None

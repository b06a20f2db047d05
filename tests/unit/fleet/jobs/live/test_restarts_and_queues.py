"""Lost hosts, jobs that start again and queues, step by step: what is asked, said, waited for and raised."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import ConfigError, HostError, Stopped, TrainingError, WeightsError
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs import lost_hosts, queue, run_on_hosts
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import RunningJob
from mixtral_run.fleet.jobs.lost_hosts import HostLost, HostWatch
from mixtral_run.fleet.jobs.taking import BusyError, busy_error
from mixtral_run.fleet.ssh.connection import Answer
from tests.unit.fleet.jobs.test_job_parts import HOSTS, JOB, row

CONFIG = FinetuneConfig(load=Path("m"), save=Path("s"), mock_data=True)


class Asked:
    """STAND-IN for SSH: it notes the questions for hosts, and answers each with an exit code."""

    def __init__(self, code: int, errors: str = "") -> None:
        self.answer, self.calls = Answer(code, "", errors), list[Any]()

    def run(self, host: Host, words: list[str], **more: Any) -> Answer:
        self.calls.append((host.name, words, more))
        return self.answer


@pytest.mark.parametrize(
    ("code", "cut_off"), [(0, False), (1, True), (2, True), (124, True), (254, True), (255, False), (256, True)]
)
def test_how_another_host_is_asked(code: int, cut_off: bool) -> None:
    ssh: Any = Asked(code)
    watch = HostWatch(RunningJob("j", "v", HOSTS, {"gpu-1": "10.0.0.9", "gpu-3": ""}), ssh)
    assert watch._is_cut_off(HOSTS[0], HOSTS[1:]) is cut_off
    reach = 'exec timeout 5 bash -c \'exec 3<>"/dev/tcp/$0/$1"\' "$1" "$2"'
    assert ssh.calls == [("gpu-22", ["sh", "-c", reach, "reach", "10.0.0.9", "22"], {"timeout_seconds": 20.0})]
    ported = parse_host("gpu-1:2200")
    HostWatch(RunningJob("j", "v", (ported,), {ported.name: "a"}), ssh)._is_cut_off(ported, HOSTS[1:])
    assert ssh.calls[1][1][-2:] == ["a", "2200"]
    # Without an address, or without a host to ask, nothing is known.
    assert not watch._is_cut_off(HOSTS[1], HOSTS[:1]) and not watch._is_cut_off(HOSTS[2], HOSTS[:1])
    assert not watch._is_cut_off(HOSTS[0], []) and len(ssh.calls) == 2


@pytest.mark.parametrize(
    ("code", "answers"), [(0, True), (1, True), (123, True), (124, False), (254, True), (255, False)]
)
def test_which_answer_is_none(code: int, answers: bool) -> None:
    ssh: Any = Asked(code)
    assert HostWatch(JOB, ssh)._answers(HOSTS[0]) is answers
    assert ssh.calls == [("gpu-1", ["true"], {"timeout_seconds": 10.0})]


def test_a_lost_host_is_told_with_those_that_are_left() -> None:
    error = HostLost(JOB, HOSTS[1])
    assert error.what == "gpu-22 is lost: it answers neither this machine nor the other hosts of job."
    assert str(error.next_command).startswith("the same command with --on gpu-1,gpu-3 --resume auto, which continues")
    assert (error.host, error.where) == (HOSTS[1], "gpu-22") and lost_hosts.TIMEOUT_SECONDS == 10.0


class Runs:
    """STAND-IN for starts and follows of a job: each attempt ends with the next of `ends`, at last well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: BaseException) -> None:
        self.ends, self.slept, self.said = list(ends), list[float](), list[str]()
        self.options: list[JobOptions] = []
        self.configs: list[Any] = []
        self.followed = 0
        monkeypatch.setattr(run_on_hosts, "start_when_free", self.start)
        monkeypatch.setattr(run_on_hosts, "JobFollower", lambda *_, **__: self)
        monkeypatch.setattr(run_on_hosts, "hosts_of", lambda words, *_: tuple(map(parse_host, words)))
        monkeypatch.setattr(run_on_hosts.time, "sleep", self.slept.append)
        monkeypatch.setattr(run_on_hosts, "_say", self.said.append)

    def start(self, verb: str, config: Any, options: JobOptions, _: Any) -> RunningJob:
        self.options.append(options)
        self.configs.append(config)
        return RunningJob("job", verb, tuple(map(parse_host, options.on)))

    def follow(self) -> None:
        self.followed += 1
        if self.ends:
            raise self.ends.pop(0)


FAILED = TrainingError("It failed.")


def test_waits_grow_to_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, *[FAILED] * 8)
    run_on_hosts.run_on_hosts("finetune", CONFIG, JobOptions(on=("a", "b"), max_restarts=8))
    assert runs.slept == [5, 10, 20, 40, 80, 160, 300, 300] and runs.followed == 9
    assert runs.said[:3] == [
        "job runs on a, b. It continues if you leave (Ctrl-C twice)", "  to stop it: mixtral-run stop job",
        "✗ It failed. Starting again on a, b in 5 s",
    ]  # fmt: skip
    place = "/var/lib/mixtral-run/checkpoints/s"
    assert runs.said[-2:] == ["✓ job is done", f"  output: {place}; to copy it here: mixtral-run fetch job"]
    assert [each.wait for each in runs.options] == [None, *["2m"] * 8]
    assert [each.resume for each in runs.configs] == [None, *["auto"] * 8]
    for number in (0, None):
        runs = Runs(monkeypatch, FAILED)
        with pytest.raises(TrainingError):
            run_on_hosts.run_on_hosts("finetune", CONFIG, JobOptions(on=("a", "b"), max_restarts=number))
        assert runs.slept == [] and runs.followed == 1


@pytest.mark.parametrize(
    ("given", "wait"), [({}, "2m"), ({"wait": "1h"}, "1h"), ({"share": True}, None)], ids=["none", "own", "share"]
)
def test_how_long_a_further_attempt_waits(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], wait: str) -> None:
    runs = Runs(monkeypatch, FAILED, HostLost(RunningJob("job", "v", tuple(map(parse_host, "abc"))), parse_host("c")))
    run_on_hosts.run_on_hosts("finetune", CONFIG, JobOptions(on=tuple("abc"), max_restarts=1, min_hosts=1, **given))
    assert [each.wait for each in runs.options[1:]] == [wait, wait] and runs.options[0].wait == given.get("wait")
    # A lost host counts as no restart.
    assert runs.slept == [5, 5] and [each.on for each in runs.options] == [("a", "b", "c")] * 2 + [("a", "b")]
    runs = Runs(monkeypatch, HostLost(RunningJob("job", "v", tuple(map(parse_host, "abc"))), parse_host("c")))
    run_on_hosts.run_on_hosts("finetune", CONFIG, JobOptions(on=tuple("abc"), min_hosts=2))
    assert runs.slept == [5]


def test_a_job_is_started_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch)
    job = run_on_hosts.run_on_hosts("finetune", CONFIG, JobOptions(on=("a",), detach=True, max_restarts=2))
    assert job.name == "job" and runs.followed == 0 and runs.said[2:] == ["output: mixtral-run logs -f job"]
    monkeypatch.setattr(run_on_hosts, "hosts_of", lambda *_: pytest.fail("any is one host"))
    run_on_hosts.run_on_hosts("finetune", CONFIG, JobOptions(on=("any",), detach=True, max_restarts=2))


@pytest.mark.parametrize(
    ("options", "number", "good"),
    [
        ({}, 1, True), ({"max_restarts": 1, "detach": True}, 1, True), ({"max_restarts": 1, "detach": True}, 2, False),
        ({"max_restarts": 0, "detach": True}, 2, True), ({"detach": True}, 2, True), ({"max_restarts": 1}, 2, True),
        ({"min_hosts": 2}, 3, True), ({"min_hosts": 3}, 3, False), ({"min_hosts": 0}, 3, False),
    ],
)  # fmt: skip
def test_when_a_job_may_start_again(options: dict[str, Any], number: int, good: bool) -> None:
    if good:
        run_on_hosts._check(JobOptions(**options), number)
    else:
        with pytest.raises(ConfigError, match="cannot be started again as asked"):
            run_on_hosts._check(JobOptions(**options), number)


def test_hosts_of_another_attempt() -> None:
    job = RunningJob("j", "finetune", (Host("one", "10.0.0.1", user="u"), Host("two", "10.0.0.2")))
    options = JobOptions()
    listed = dataclasses.replace(options, inventory=Path("hosts.yml"))
    assert run_on_hosts._hosts_left(job, options, FAILED) == ("u@10.0.0.1", "10.0.0.2")
    assert run_on_hosts._hosts_left(job, listed, FAILED) == ("one", "two")
    lost = HostLost(job, job.hosts[0])
    for least, left in ((None, None), (1, ("two",)), (2, None)):
        assert run_on_hosts._hosts_left(job, dataclasses.replace(listed, min_hosts=least), lost) == left
    for error in (ConfigError("x"), HostError("x"), WeightsError("x"), Stopped("x")):
        assert run_on_hosts._hosts_left(job, options, error) is None


def test_only_a_verb_that_can_resume_does() -> None:
    convert = ConvertConfig(hf_model_path="/h", output_path=Path("x"))
    assert run_on_hosts._resuming(convert) == convert
    assert run_on_hosts._resuming(CONFIG) == dataclasses.replace(CONFIG, resume="auto")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"save": None}, None), ({}, None),
        ({"save": "/srv/x"}, "  output: /srv/x; to copy it here: mixtral-run fetch job"),
        ({"save": "", "output_path": "x"}, "  output: /c/x; to copy it here: mixtral-run fetch job"),
        ({"save": "s3://b/x", "output": "y"}, "  output: s3://b/x"),
    ],
)  # fmt: skip
def test_where_the_output_is(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], text: str | None) -> None:
    said: list[str] = []
    monkeypatch.setattr(run_on_hosts, "_say", said.append)
    config: Any = SimpleNamespace(**values)
    run_on_hosts._say_output(JOB, config, JobOptions(checkpoints_folder="/c"))
    assert said == ([] if text is None else [text])


class Queue:
    """A queue whose clock stands still but for its own waits. attempts: what each attempt raises, at last none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *attempts: BaseException) -> None:
        self.now, self.slept, self.said, self.given = 0.0, list[float](), list[str](), list[Any]()
        self.attempts, self.spread = list(attempts), list[Any]()
        monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(queue, "random", SimpleNamespace(uniform=lambda *given: self.spread.append(given) or 0.5))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def attempt(self, hosts: Any) -> str:
        self.given.append(hosts)
        if self.attempts:
            raise self.attempts.pop(0)
        return "job"

    def run(self, verb: str = "finetune", **options: Any) -> str:
        return queue.when_free(verb, JobOptions(**options), self.said.append, MagicMock(), self.attempt)


def busy(job: str = "x") -> BusyError:
    return busy_error([("gpu-1", job)])


def test_a_queue_looks_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Queue(monkeypatch, busy(), busy(), busy("y"), busy("y"), busy())
    assert found.run(on=("gpu-1",), wait="forever") == "job" and found.given == [()] * 6
    assert found.slept == [15.0] * 5 and found.spread == [(0.75, 1.25)] * 5
    assert found.said == [f"waiting for a free host: gpu-1: {job} is running" for job in "xyx"]
    for wait, slept in (("40", [15, 15, 10]), ("20s", [15, 5]), ("1m", [15] * 4), ("1", [1]), (None, []), ("0", [])):
        found = Queue(monkeypatch, *[busy()] * 9)
        with pytest.raises(BusyError):
            found.run(on=("gpu-1",), wait=wait)
        assert found.slept == slept
    with pytest.raises(HostError, match="other"):
        Queue(monkeypatch, HostError("other")).run(on=("gpu-1",), wait="1h")
    assert [queue.wait_seconds(each) for each in ("0", "1", "7s", "2m", "2h", "2d")] == [0, 1, 7, 120, 7200, 172800]
    assert queue.LOOK_SECONDS == 30.0


@pytest.mark.parametrize(
    ("on", "good"),
    [(("any",), True), (("a", "b"), True), (("any", "a"), False), (("a,any",), False), (("any,any",), False),
     (("any,",), True), (("",), True)],
)  # fmt: skip
def test_any_stands_alone(on: tuple[str, ...], good: bool) -> None:
    if good:
        queue._refuse_any_among_others(JobOptions(on=on))
    else:
        with pytest.raises(ConfigError, match="--on any is one free host of all"):
            queue._refuse_any_among_others(JobOptions(on=on))


@pytest.mark.parametrize(
    ("state", "verb", "starts", "share", "tried"),
    [
        ("running", "finetune", "finetune", False, ["gpu-22", "gpu-3"]),
        ("exited", "finetune", "finetune", False, ["gpu-1", "gpu-22", "gpu-3"]),
        ("running", "convert", "finetune", False, ["gpu-1", "gpu-22", "gpu-3"]),
        ("running", "finetune", "convert", False, ["gpu-1", "gpu-22", "gpu-3"]),
        ("running", "finetune", "finetune", True, ["gpu-1", "gpu-22", "gpu-3"]),
    ],
)
def test_any_skips_hosts_that_are_known_to_be_busy(
    monkeypatch: pytest.MonkeyPatch, state: str, verb: str, starts: str, share: bool, tried: list[str]
) -> None:
    found = Queue(monkeypatch, *[HostError("no")] * 9)
    monkeypatch.setattr(queue, "hosts_of", lambda *given: HOSTS if given == ((), None, None) else ())
    monkeypatch.setattr(queue, "list_jobs", lambda *_: ([row(state=state, verb=verb)], []))
    with pytest.raises(HostError) as caught:
        found.run(starts, on=("any",), share=share)
    assert [each[0].name for each in found.given] == tried and found.said == []
    assert isinstance(caught.value, BusyError) is (len(tried) == 2)
    if len(tried) == 2:
        assert caught.value.problems == ("gpu-1: job is running", "gpu-22: no", "gpu-3: no")
    else:
        assert caught.value.problems == ("gpu-1: no", "gpu-22: no", "gpu-3: no")

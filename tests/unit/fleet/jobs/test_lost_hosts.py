"""A host of several is lost: when the job is stopped, and on which hosts it starts again."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, MixtralRunError, Stopped, TrainingError, WeightsError
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs import job_log, lost_hosts, run_on_hosts
from mixtral_run.fleet.jobs.job_log import JobFollower
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob
from mixtral_run.fleet.jobs.lost_hosts import HostLost, HostWatch
from mixtral_run.fleet.ssh.connection import Answer, Ssh

HOSTS = tuple(map(parse_host, ("gpu-01", "gpu-02", "gpu-03")))
JOB = RunningJob("job", "finetune", HOSTS, {host.name: f"10.0.0.{n}" for n, host in enumerate(HOSTS, start=1)})
FINETUNE = FinetuneConfig(load=Path("b"), save=Path("s"), mock_data=True)


class Network(Ssh):
    """STAND-IN for hosts behind SSH. `down`: hosts that nobody reaches; `hidden`: hosts that only others reach."""

    def __init__(self) -> None:
        super().__init__()
        self.down: set[str] = set()
        self.hidden: set[str] = set()
        self.stopped: list[tuple[str, ...]] = []
        self.reason = "connect: No route to host"

    def run(self, host: Host, command: Sequence[str], **_: object) -> Answer:  # type: ignore[override]
        if host.name in self.down | self.hidden:
            return Answer(255, "", "timed out")
        if "reach" in command:
            asked = next(name for name, address in JOB.addresses.items() if address in command)
            return Answer(1, "", self.reason) if asked in self.down else Answer(0, "", "")
        if "stop" in command:
            self.stopped.append((host.name, *command[-2:]))
        return Answer(0, "", "")

    def stream(self, host: Host, *_: object) -> int:
        del host
        return 255


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr(lost_hosts, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(lost_hosts, "PROBE_SECONDS", 0.02)
    return Network()


def looks(network: Network) -> list[str]:
    """The hosts that are lost after a while."""
    watch = HostWatch(JOB, network)
    assert watch.look(HOSTS) == []
    time.sleep(0.06)
    return [host.name for host in watch.look(HOSTS)]


def test_a_host_is_lost_only_if_the_others_do_not_reach_it_either(network: Network) -> None:
    assert looks(network) == []
    network.hidden = {"gpu-02"}
    assert looks(network) == []
    network.down, network.hidden = {"gpu-02"}, set()
    assert looks(network) == ["gpu-02"]
    # No sshd, or a firewall that answers: the host is there.
    network.reason = "connect: Connection refused"
    assert looks(network) == []


def test_without_a_host_that_answers_nothing_is_known(network: Network) -> None:
    """This machine has lost its own connection."""
    network.hidden = {host.name for host in HOSTS}
    assert looks(network) == []


def test_a_host_that_answers_again_in_time_is_not_lost(network: Network) -> None:
    watch = HostWatch(JOB, network)
    network.down = {"gpu-02"}
    watch.look(HOSTS)
    network.down = set()
    watch.look(HOSTS)
    time.sleep(0.06)
    network.down = {"gpu-02"}
    assert watch.look(HOSTS) == []


def test_the_job_of_a_lost_host_is_stopped_on_the_others_and_the_host_is_named(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(hosts: Sequence[Host], _: Ssh) -> tuple[list[JobRow], list[MixtralRunError]]:
        (host,) = hosts
        if host.name in network.down:
            return [], [MixtralRunError("no answer")]
        ended = any(each[0] == host.name for each in network.stopped)
        return [
            JobRow("job", "finetune", host, "exited" if ended else "running", 143 if ended else 0, False, "", "")
        ], []

    monkeypatch.setattr(job_log, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(job_log, "list_jobs", rows)
    network.down = {"gpu-02"}
    said: list[str] = []
    began = time.monotonic()
    with pytest.raises(HostLost, match="gpu-02 is lost") as caught:
        JobFollower(JOB, network, io.StringIO(), say=said.append).follow()
    assert time.monotonic() - began < 5
    assert caught.value.host.name == "gpu-02"
    assert {each[0] for each in network.stopped} == {"gpu-01", "gpu-03"}
    assert any("gpu-02 is lost" in line for line in said)
    # Until then: two questions, one to another host, and the time to end; a minute is promised.
    real = (5.0 + 10.0) * 2 + 5.0 + job_log.LOST_GRACE_SECONDS
    assert real < 60


class Starts:
    """STAND-IN for starting and following: each attempt ends with the next of `ends`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: MixtralRunError | None) -> None:
        self.started: list[tuple[tuple[str, ...], object]] = []
        self.waits: list[float] = []
        left = list(ends)

        def start(verb: str, config: FinetuneConfig, options: JobOptions, say: object) -> RunningJob:
            # A further attempt waits for containers of the one before it that are still ending.
            assert options.wait == ("2m" if self.started else None)
            self.started.append((options.on, config.resume))
            return RunningJob(f"job-{len(self.started)}", verb, tuple(map(parse_host, options.on)))

        class Follower:
            def __init__(self, *_: object, **__: object) -> None: ...

            def follow(self) -> None:
                if (end := left.pop(0)) is not None:
                    raise end

        monkeypatch.setattr(run_on_hosts, "start_when_free", start)
        monkeypatch.setattr(run_on_hosts, "JobFollower", Follower)
        monkeypatch.setattr(run_on_hosts, "hosts_of", lambda words, *_: tuple(map(parse_host, words)))
        monkeypatch.setattr(run_on_hosts.time, "sleep", self.waits.append)

    def run(self, *on: str, **options: object) -> None:
        run_on_hosts.run_on_hosts("finetune", FINETUNE, JobOptions(on=on, **options))  # type: ignore[arg-type]


LOST = HostLost(JOB, HOSTS[1])
FAILED = TrainingError("failed")


def test_a_job_starts_again_on_the_hosts_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(monkeypatch, LOST, None)
    starts.run("gpu-01", "gpu-02", "gpu-03", min_hosts=2)
    assert starts.started == [(("gpu-01", "gpu-02", "gpu-03"), None), (("gpu-01", "gpu-03"), "auto")]


def test_a_lost_host_ends_the_job_without_the_users_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"max_restarts": 5}):
        with pytest.raises(HostLost, match="gpu-02 is lost") as caught:
            Starts(monkeypatch, LOST).run("gpu-01", "gpu-02", "gpu-03", **options)
        assert "--on gpu-01,gpu-03 --resume auto" in str(caught.value)
    # Two are lost, and the one that is left is not enough.
    starts = Starts(monkeypatch, LOST, HostLost(JOB, HOSTS[2]))
    with pytest.raises(HostLost, match="gpu-03 is lost"):
        starts.run("gpu-01", "gpu-02", "gpu-03", min_hosts=2, max_restarts=9)
    assert len(starts.started) == 2


def test_a_failed_job_starts_again_as_a_whole_with_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(monkeypatch, FAILED, FAILED, FAILED, None)
    starts.run("gpu-01", "gpu-02", max_restarts=3)
    assert [on for on, _ in starts.started] == [("gpu-01", "gpu-02")] * 4
    assert [resume for _, resume in starts.started] == [None, "auto", "auto", "auto"]
    assert starts.waits == [5, 10, 20]
    with pytest.raises(TrainingError):
        Starts(monkeypatch, FAILED, FAILED).run("gpu-01", "gpu-02", max_restarts=1)


@pytest.mark.parametrize("end", [WeightsError("x"), ConfigError("x"), Stopped("x")])
def test_what_repeating_cannot_cure_is_not_repeated(monkeypatch: pytest.MonkeyPatch, end: MixtralRunError) -> None:
    with pytest.raises(type(end)):
        Starts(monkeypatch, end).run("gpu-01", "gpu-02", max_restarts=3)


def test_on_one_host_the_engine_starts_the_container_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError):
        Starts(monkeypatch, FAILED).run("gpu-01", max_restarts=3)


@pytest.mark.parametrize(
    ("on", "options", "problem"),
    [
        (("gpu-01",), {"min_hosts": 1}, "--min-hosts: expected fewer than the 1 of --on; found 1"),
        (("gpu-01", "gpu-02"), {"min_hosts": 2}, "expected fewer than the 2"),
        (("gpu-01", "gpu-02"), {"max_restarts": 1, "detach": True}, "--max-restarts: expected no --detach"),
    ],
)
def test_what_nobody_would_fulfil_is_refused(
    monkeypatch: pytest.MonkeyPatch, on: tuple[str, ...], options: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Starts(monkeypatch).run(*on, **options)
    assert problem in str(caught.value)

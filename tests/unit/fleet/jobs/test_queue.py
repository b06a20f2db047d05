"""`--on any` and `--wait`, with hosts that are only names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, HostError, MixtralRunError
from mixtral_run.fleet.hosts import Host, parse_hosts, remember_hosts
from mixtral_run.fleet.jobs import queue
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob
from mixtral_run.fleet.jobs.queue import start_when_free, wait_seconds
from mixtral_run.fleet.jobs.taking import BusyError, OutputTakenError, busy_error

HOSTS = parse_hosts(["gpu-01", "gpu-02", "gpu-03"])
CONFIG = FinetuneConfig(load=Path("base"), save=Path("adapter"), mock_data=True)


class Fleet:
    """Three hosts. running: (host, verb, job) that `jobs` would list. refusals: what `start` raises on a host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        remember_hosts(HOSTS)
        self.running: list[tuple[Host, str, str]] = []
        self.refusals: dict[str, list[MixtralRunError]] = {}
        self.tried: list[str] = []
        self.said: list[str] = []
        self.slept: list[float] = []
        monkeypatch.setattr(queue, "list_jobs", lambda *_: (self._rows(), []))
        monkeypatch.setattr(queue, "start", self._start)
        self.now = 0.0
        monkeypatch.setattr(queue.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(queue.time, "sleep", self._sleep)

    def _rows(self) -> list[JobRow]:
        return [JobRow(job, verb, host, "running", 0, False, "", "") for host, verb, job in self.running]

    def _start(self, verb: str, config: Any, options: JobOptions, ssh: Any, hosts: tuple[Host, ...] = ()) -> RunningJob:
        names = [host.name for host in hosts] or list(options.on)
        self.tried += names
        for name in names:
            if self.refusals.get(name):
                raise self.refusals[name].pop(0)
        return RunningJob("finetune-9", verb, hosts)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def start(self, *on: str, **more: Any) -> RunningJob:
        return start_when_free("finetune", CONFIG, JobOptions(on=on, **more), self.said.append, ssh=object())  # type: ignore[arg-type]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fleet:
    return Fleet(monkeypatch, tmp_path)


def test_any_takes_the_first_host_that_is_free(fleet: Fleet) -> None:
    fleet.running = [(HOSTS[0], "finetune", "finetune-1"), (HOSTS[1], "convert", "convert-1")]
    assert fleet.start("any").hosts == (HOSTS[1],)
    assert fleet.tried == ["gpu-02"]


def test_any_goes_on_where_a_host_is_cordoned_or_another_operator_was_faster(fleet: Fleet) -> None:
    fleet.refusals = {
        "gpu-01": [HostError("gpu-01 takes no jobs: it is cordoned.")],
        "gpu-02": [busy_error([("gpu-02", "finetune-7")])],
    }
    assert fleet.start("any").hosts == (HOSTS[2],)
    assert fleet.tried == ["gpu-01", "gpu-02", "gpu-03"]
    assert fleet.said == ["! gpu-01: gpu-01 takes no jobs: it is cordoned."]


def test_any_goes_on_where_another_job_writes_to_the_same_output(fleet: Fleet) -> None:
    fleet.refusals = {"gpu-01": [OutputTakenError("Another job writes to the same output.")]}
    assert fleet.start("any").hosts == (HOSTS[1],)
    assert fleet.said == ["! gpu-01: Another job writes to the same output."]
    fleet.refusals = {"gpu-01": [ConfigError("--nproc-per-node: expected a number.")]}
    with pytest.raises(ConfigError, match="nproc-per-node"):
        fleet.start("any")


def test_without_a_free_host_each_one_is_named(fleet: Fleet) -> None:
    fleet.running = [(host, "generate", f"generate-{host.name}") for host in HOSTS[:2]]
    fleet.refusals = {"gpu-03": [HostError("gpu-03 takes no jobs: it is cordoned.")]}
    with pytest.raises(BusyError) as caught:
        fleet.start("any")
    assert caught.value.problems == (
        "gpu-01: generate-gpu-01 is running", "gpu-02: generate-gpu-02 is running",
        "gpu-03: gpu-03 takes no jobs: it is cordoned.",
    )  # fmt: skip
    assert fleet.slept == []


def test_where_no_host_can_ever_run_it_nobody_waits(fleet: Fleet) -> None:
    fleet.refusals = {host.name: [HostError(f"{host.name} cannot be reached.")] for host in HOSTS}
    with pytest.raises(HostError, match="No host can run the job") as caught:
        fleet.start("any", wait="forever")
    assert not isinstance(caught.value, BusyError) and len(caught.value.problems) == 3


def test_wait_takes_the_host_when_the_other_job_has_ended(fleet: Fleet) -> None:
    fleet.refusals = {"gpu-01": [busy_error([("gpu-01", "finetune-1")])] * 3}
    fleet.start("gpu-01", wait="forever")
    assert fleet.tried == ["gpu-01"] * 4 and len(fleet.slept) == 3
    assert all(20 < seconds < 40 for seconds in fleet.slept)
    assert fleet.said == ["waiting for a free host: gpu-01: finetune-1 is running"]


def test_wait_ends_after_its_time(fleet: Fleet) -> None:
    fleet.refusals = {"gpu-01": [busy_error([("gpu-01", "finetune-1")])] * 100}
    with pytest.raises(BusyError):
        fleet.start("gpu-01", wait="2m")
    assert sum(fleet.slept) == pytest.approx(120)
    fleet.tried.clear()
    with pytest.raises(BusyError, match=r"--wait \[TIME\]"):
        fleet.start("gpu-01")
    assert fleet.tried == ["gpu-01"]


def test_share_starts_next_to_another_job(fleet: Fleet) -> None:
    fleet.running = [(HOSTS[0], "finetune", "finetune-1")]
    assert fleet.start("any", share=True).hosts == (HOSTS[0],)


def test_times() -> None:
    assert [wait_seconds(text) for text in (None, "90", "90s", "30m", "2h", "1d")] == [0, 90, 90, 1800, 7200, 86400]
    assert wait_seconds("forever") == float("inf")
    for wrong in ("", "soon", "-1", "2 h", "1w"):
        with pytest.raises(ConfigError, match="--wait: expected a time"):
            JobOptions(wait=wrong).check()
    with pytest.raises(ConfigError, match="--wait, --share: expected one of them"):
        JobOptions(wait="2h", share=True).check()


@pytest.mark.parametrize("on", [("any", "gpu-01"), ("any,gpu-01",)])
def test_any_stands_alone(fleet: Fleet, on: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--on any is one free host"):
        fleet.start(*on)
    assert fleet.tried == []


def test_chat_and_shell_take_a_free_host(fleet: Fleet) -> None:
    fleet.running = [(HOSTS[0], "finetune", "finetune-1")]

    def host_of(verb: str, options: JobOptions) -> str:
        def attempt(hosts: tuple[Host, ...]) -> str:
            if hosts[0].name == "gpu-02":
                raise HostError("There is no image of the kit on gpu-02.")
            return hosts[0].name

        return queue.when_free(verb, options, fleet.said.append, object(), attempt)  # type: ignore[arg-type]

    any_host = JobOptions(on=("any",))
    assert [host_of(verb, any_host) for verb in ("chat", "shell")] == ["gpu-03", "gpu-03"]
    assert host_of("chat", JobOptions(on=("any",), share=True)) == "gpu-01"
    # Whether a shell holds a GPU is left to its host.
    fleet.running[:] = [(HOSTS[0], "shell", "shell-1")]
    assert host_of("chat", any_host) == "gpu-01"
    fleet.running[:] = [(HOSTS[0], "finetune", "finetune-1")]
    fleet.running.append((HOSTS[2], "serve", "serve-1"))
    with pytest.raises(BusyError) as caught:
        host_of("chat", any_host)
    assert caught.value.jobs == (("gpu-01", "finetune-1"), ("gpu-03", "serve-1"))
    assert "no image of the kit on gpu-02" in str(caught.value)

"""Two jobs on a host never write to one output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import Host, parse_hosts
from mixtral_run.fleet.jobs.job_spec import JobOptions, make_spec
from mixtral_run.fleet.jobs.jobs import refuse_taken
from mixtral_run.fleet.jobs.taking import BusyError, OutputTakenError
from mixtral_run.fleet.ssh.connection import Answer, Ssh

HOSTS = parse_hosts(["gpu-01", "gpu-02"])


class FakeSsh:
    """An SSH whose hosts list the same jobs."""

    def __init__(self, *rows: str) -> None:
        self.rows = rows

    def each(self, hosts: Sequence[Host], work: Callable[[Host], Any]) -> list[Any]:
        return [work(host) for host in hosts]

    def run(self, *_: object, **__: object) -> Answer:
        return Answer(0, "\n".join(self.rows), "")


def row(state: str, output: str, verb: str = "finetune") -> str:
    return f"{verb}-1\t{verb}\t{state}\t0\tfalse\t2026-01-01T00:00:00.0Z\t{output}\t1"


def refuse(*rows: str, save: str = "adapter", share: bool = True, wait: str | None = None) -> None:
    config = FinetuneConfig(load=Path("base"), save=Path(save), mock_data=True)
    spec = make_spec("finetune-2", "finetune", config, JobOptions(on=("gpu-01",), share=share, wait=wait), 1)
    refuse_taken(cast(Ssh, FakeSsh(*rows)), HOSTS, spec)


def test_a_running_job_with_the_same_output_is_named() -> None:
    folder = "/var/lib/mixtral-run/checkpoints/adapter"
    with pytest.raises(OutputTakenError) as refused:
        refuse(row("exited", folder), row("running", folder))
    assert refused.value.where == folder
    assert refused.value.problems == tuple(
        f"{host}: finetune-1 (finetune), running since 2026-01-01T00:00:00 UTC" for host in ("gpu-01", "gpu-02")
    )


def test_outputs_are_compared_in_each_hosts_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dataclasses.replace(HOSTS[1], checkpoints_folder="/data/c")
    monkeypatch.setattr(sys.modules[__name__], "HOSTS", (HOSTS[0], own))
    with pytest.raises(OutputTakenError) as refused:
        refuse(row("running", "/data/c/adapter"))
    assert refused.value.where == "/data/c/adapter"
    assert refused.value.problems == ("gpu-02: finetune-1 (finetune), running since 2026-01-01T00:00:00 UTC",)


def test_ended_jobs_and_other_outputs_are_no_obstacle() -> None:
    refuse(row("exited", "/var/lib/mixtral-run/checkpoints/adapter"), row("running", "/data/adapter"))
    with pytest.raises(ConfigError):
        refuse(row("running", "/data/adapter"), save="/data/adapter")


def test_a_host_that_runs_another_job_is_busy() -> None:
    with pytest.raises(BusyError) as caught:
        refuse(row("exited", "/a"), row("running", "/b"), share=False)
    assert caught.value.jobs == (("gpu-01", "finetune-1"), ("gpu-02", "finetune-1"))
    refuse(row("exited", "/a"), row("running", "/b", "convert"), share=False)


def test_who_waits_may_wait_for_the_job_with_the_same_output() -> None:
    same = row("running", "/var/lib/mixtral-run/checkpoints/adapter")
    with pytest.raises(BusyError):
        refuse(same, share=False, wait="forever")
    with pytest.raises(ConfigError):
        refuse(same, share=False)

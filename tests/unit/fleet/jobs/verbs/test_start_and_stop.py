"""The start of a job on its hosts, and what is told of the end of a job that was asked to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.jobs import jobs, run_on_hosts
from mixtral_run.fleet.jobs import stop as stop_verb
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import JobRow
from mixtral_run.fleet.jobs.stop import stop_job
from mixtral_run.fleet.jobs.taking import BusyError
from mixtral_run.fleet.ssh.connection import Answer
from tests.unit.fleet.jobs.test_job_parts import HOSTS, row


@pytest.mark.parametrize(("inventory", "remembered"), [(None, ["gpu-1", "gpu-3"]), ("hosts.yml", [])])
def test_hosts_of_a_job_are_remembered_unless_an_inventory_names_them(
    monkeypatch: pytest.MonkeyPatch, inventory: str | None, remembered: list[str]
) -> None:
    """Three hosts, of which the second is known from an inventory already."""
    names: list[str] = []
    started: list[str] = []
    facts = [SimpleNamespace(address=f"10.0.0.{number}") for number in range(3)]
    monkeypatch.setattr(jobs, "facts_of", lambda *_: facts)
    monkeypatch.setattr(jobs, "check_same_gpus", lambda *_: None)
    monkeypatch.setattr(jobs, "refuse_taken", lambda *_: None)
    monkeypatch.setattr(jobs, "make_spec", lambda *given: given)
    monkeypatch.setattr(jobs, "remembered_hosts", lambda: "known")
    monkeypatch.setattr(jobs, "inventory_entry_of", lambda host, known: known == "known" and host.name == "gpu-22")
    monkeypatch.setattr(jobs, "remember_hosts", lambda hosts: names.extend(host.name for host in hosts))
    monkeypatch.setattr(
        jobs, "start_on", lambda _, host, fact, spec: started.append(f"{host.name} {fact.address} {spec[-1]}")
    )
    ssh: Any = SimpleNamespace(each=lambda hosts, work: [work(host) for host in hosts])
    options: Any = SimpleNamespace(
        check=lambda: None, inventory=inventory, rendezvous_address=None, rendezvous_port=29500
    )
    found = jobs.start("finetune", MagicMock(), options, ssh, HOSTS)
    assert names == remembered and found.addresses == {"gpu-1": "10.0.0.0", "gpu-22": "10.0.0.1", "gpu-3": "10.0.0.2"}
    assert started == [f"{host.name} 10.0.0.{number} 10.0.0.0:29500" for number, host in enumerate(HOSTS)]


def test_the_end_of_a_stopped_job_is_told_for_each_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit codes 130 and 143 are those of a signal, 137 of a kill; a job saves at the first two and ends with 0 too."""
    found: list[JobRow] = [row(state="running")]
    missing: list[HostError] = []
    ends: list[JobRow] = []
    said: list[str] = []
    monkeypatch.setattr(stop_verb, "find_whole_job", lambda *_, **__: (found, missing))
    monkeypatch.setattr(stop_verb, "stop", lambda *_: ends)
    for code in (0, 130, 143):
        ends[:] = [row(code=code)]
        stop_job("job", HOSTS, said.append)
        assert said[-2:] == ["Asking job to save and end …", f"✓ job has ended on gpu-1 (exit code {code})"]
    said.clear()
    ends[:] = [row(code=1), row(HOSTS[1], code=137), row(HOSTS[2], code=136)]
    with pytest.raises(HostError, match="job has ended, but not cleanly") as caught:
        stop_job("job", HOSTS, said.append)
    assert said == ["Asking job to save and end …"]
    assert caught.value.problems == (
        "gpu-1: exit code 1; its output shows whether it saved",
        "gpu-22: it did not end in time and was killed; unsaved work is lost",
        "gpu-3: exit code 136; its output shows whether it saved",
    )
    assert caught.value.next_command == "mixtral-run logs job"
    found[:], said[:] = [row(), row(HOSTS[1])], []
    stop_job("job", HOSTS, said.append)
    assert said == ["job has already ended."]
    found[:], said[:] = [row(state="exited", num_hosts=3), row(HOSTS[1], num_hosts=3)], []
    missing.append(HostError("gpu-3 does not answer."))
    with pytest.raises(HostError, match="job may still run: not all its hosts answer") as caught:
        stop_job("job", HOSTS, said.append)
    assert (said, caught.value.expected, caught.value.found) == ([], "3 hosts", "2")
    assert caught.value.problems == (str(missing[0]),) and caught.value.next_command == "mixtral-run stop job"
    found[1] = row(HOSTS[1], "running", num_hosts=3)
    with pytest.raises(HostError) as caught:
        stop_job("job", HOSTS, said.append)
    assert len(caught.value.problems) == 4 and said == ["Asking job to save and end …"]


@pytest.mark.parametrize(
    ("code", "errors", "problem", "removed"),
    [
        (0, "a warning", None, False),
        (75, "running other-1", "gpu-1: other-1 is running", False),
        (76, "maintenance", "gpu-1", False),
        (1, "first\nno such image\n", "no such image", True),
        (74, "", "exit code 74", True),
        (77, "", "exit code 77", True),
    ],
)
def test_a_container_that_does_not_start_is_removed(
    monkeypatch: pytest.MonkeyPatch, code: int, errors: str, problem: str | None, removed: bool
) -> None:
    """Exit code 75 says that another job runs, 76 that the host takes none: no container was made then."""
    asked: list[Any] = []
    for name in ("send_files", "container_argv", "start_argv"):
        monkeypatch.setattr(jobs, name, lambda *_: None)
    monkeypatch.setattr(jobs, "engine", lambda _, host, *words: asked.append((host.name, words)))
    ssh: Any = SimpleNamespace(run=lambda *_, **__: Answer(code, "", errors))
    spec: Any = SimpleNamespace(name="job")
    facts: Any = None
    if problem is None:
        jobs.start_on(ssh, HOSTS[0], facts, spec)
    else:
        with pytest.raises(HostError) as caught:
            jobs.start_on(ssh, HOSTS[0], facts, spec)
        assert problem in str(caught.value) and isinstance(caught.value, BusyError) == (code == 75)
        assert ("could not be started on gpu-1" in caught.value.what) == removed
    assert asked == ([("gpu-1", ("rm", "--force", "job"))] if removed else [])


@pytest.mark.parametrize(
    ("least", "num_hosts", "good"), [(1, 2, True), (1, 1, False), (2, 2, False), (2, 3, True), (0, 2, False)]
)
def test_a_job_starts_again_on_fewer_hosts_and_on_one_at_least(least: int, num_hosts: int, good: bool) -> None:
    options = JobOptions(min_hosts=least)
    if good:
        run_on_hosts._check(options, num_hosts)
    else:
        with pytest.raises(ConfigError, match="cannot be started again") as caught:
            run_on_hosts._check(options, num_hosts)
        (problem,) = caught.value.problems
        assert problem == f"--min-hosts: expected fewer than the {num_hosts} of --on; found {least}"
    assert (run_on_hosts.SHORTEST_SECONDS, run_on_hosts.LONGEST_SECONDS, run_on_hosts.ENDING) == (5.0, 300.0, "2m")

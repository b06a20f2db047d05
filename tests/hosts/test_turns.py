"""--serial and --forks over simulated hosts: the number of hosts in progress, and of hosts that work, at a time."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.bootstrap import bootstrap as module
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest, bootstrap
from tests.hosts.conftest import HostMaker


def events(home: Path) -> list[dict[str, Any]]:
    """Return the events of the only play in order."""
    files = list((home / "state/mixtral-run/plays").glob("*/artifacts/run/job_events/*.json"))
    return sorted((json.loads(file.read_text()) for file in files), key=lambda event: event["counter"])


@pytest.mark.parametrize(("serial", "at_once"), [(None, 3), ("1", 1), ("2", 2), ("34%", 1)])
def test_so_many_hosts_are_on_their_way_before_the_next_begins(
    light_hosts: HostMaker, home: Path, serial: str | None, at_once: int
) -> None:
    # The kit's own playbook runs with only the tasks that every run has, so that no role touches these hosts.
    request = BootstrapRequest(
        hosts=tuple(host.target for host in light_hosts(3)), serial=serial, tags=("always",),
        extra_vars=(f"ansible_python_interpreter={sys.executable}",),
    )  # fmt: skip
    end = bootstrap(request, io.StringIO())
    assert not end.progress.bad, end.text
    data = [event["event_data"] for event in events(home) if event["event"] in ("runner_on_start", "runner_on_ok")]
    hosts = [each["host"] for each in data if each["play"] == data[0]["play"]]
    ways = [(hosts.index(host), len(hosts) - hosts[::-1].index(host)) for host in set(hosts)]
    assert len(ways) == 3
    assert max(sum(begin <= moment < end for begin, end in ways) for moment in range(len(hosts))) == at_once


@pytest.mark.parametrize(
    ("forks", "most_tries", "expected"), [(1, 10, ["begin", "end"] * 3), (3, 300, ["begin"] * 3 + ["end"] * 3)]
)
def test_so_many_hosts_work_at_the_same_time(
    light_hosts: HostMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    forks: int, most_tries: int, expected: list[str],
) -> None:  # fmt: skip
    # Each host waits for the others to begin. They cannot begin if they have to wait for this host to finish.
    seen, playbook = tmp_path / "seen", tmp_path / "meet.yml"
    script = (
        f"echo begin >>{seen}; for try in $(seq {most_tries}); do "
        f"[ $(grep -c begin {seen}) -lt 3 ] || break; sleep 0.1; done; echo end >>{seen}"
    )
    tasks = [{"name": "Meet", "ansible.builtin.raw": script}]
    playbook.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    monkeypatch.setattr(module, "playbook", {"bootstrap": playbook}.__getitem__)
    targets = tuple(host.target for host in light_hosts(3))
    assert not bootstrap(BootstrapRequest(hosts=targets, forks=forks), io.StringIO()).progress.bad
    assert seen.read_text().split() == expected

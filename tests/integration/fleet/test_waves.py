"""--serial and --forks over simulated hosts: in which order and how many at the same time, by what the hosts saw."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path

import pytest

from mixtral_run.fleet import bootstrap as module
from mixtral_run.fleet.bootstrap import BootstrapRequest, bootstrap
from tests.integration.fleet.conftest import HostMaker


def events(home: Path) -> list[dict[str, object]]:
    """What the only play told, in order."""
    files = list((home / "state/mixtral-run/plays").glob("*/artifacts/run/job_events/*.json"))
    return sorted((json.loads(file.read_text()) for file in files), key=lambda event: event["counter"])


@pytest.mark.parametrize(("serial", "waves"), [(None, 1), ("1", 3), ("2", 2), ("34%", 3)])
def test_a_wave_has_ended_before_the_next_begins(
    light_hosts: HostMaker, home: Path, serial: str | None, waves: int
) -> None:
    # The kit's own playbook, of which only what every run has touches these hosts: a word that changes nothing.
    request = BootstrapRequest(
        hosts=tuple(host.target for host in light_hosts(3)), serial=serial, tags=("no-role",),
        extra_vars=(f"ansible_python_interpreter={sys.executable}",),
    )  # fmt: skip
    end = bootstrap(request, io.StringIO())
    assert not end.progress.bad, end.text
    data = [event["event_data"] for event in events(home) if event["event"] in ("runner_on_start", "runner_on_ok")]
    first_play = [each for each in data if each["play"] == data[0]["play"]]
    wave_of_task = [(each["task_uuid"], each["host"]) for each in first_play]
    seen = [{host for _, host in group} for _, group in itertools.groupby(wave_of_task, key=lambda pair: pair[0])]
    told_apart = [hosts for hosts, _ in itertools.groupby(seen)]
    assert len(told_apart) == waves
    assert len(set().union(*told_apart)) == sum(len(hosts) for hosts in told_apart) == 3


@pytest.mark.parametrize(
    ("forks", "most_tries", "expected"), [(1, 10, ["begin", "end"] * 3), (3, 300, ["begin"] * 3 + ["end"] * 3)]
)
def test_so_many_hosts_work_at_the_same_time(
    light_hosts: HostMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    forks: int, most_tries: int, expected: list[str],
) -> None:  # fmt: skip
    # Each host waits for the others to begin, which they do not where they have to wait for it.
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

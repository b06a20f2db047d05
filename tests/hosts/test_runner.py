"""Real plays over simulated hosts: the progress that the runner reports, its artifacts, and its cleanup."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path

from mixtral_run.fleet.bootstrap.progress import FleetProgress, Phase
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.plays.runner import Play, PlayEnd, RunningPlay
from mixtral_run.fleet.ssh.connection import Ssh, connection_options
from tests.hosts.conftest import PLAYBOOKS, HostMaker


def small_play(hosts: tuple[Host, ...], folder: Path, **variables: object) -> Play:
    options = connection_options(Ssh().known_hosts)
    # Simulated hosts share this machine, whose newest Python may be the shim of a version manager.
    values = {"small_folder": str(folder), "ansible_python_interpreter": sys.executable, **variables}
    return Play(playbook=PLAYBOOKS / "small.yml", hosts=hosts, variables=values, diff=True, ssh_args=tuple(options))


def run(play: Play) -> tuple[FleetProgress, PlayEnd, list[dict[str, object]]]:
    progress, events = FleetProgress(host.inventory_name for host in play.hosts), []
    running = RunningPlay(play)
    for event in running.events():
        if event is not None:
            events.append(event)
            progress.fold(event)
    return progress, running.wait(), events


def test_a_play_is_folded_and_its_artifacts_are_private(light_hosts: HostMaker, tmp_path: Path) -> None:
    hosts = tuple(parse_host(host.target) for host in light_hosts(2))
    failing = hosts[1].inventory_name
    progress, end, _ = run(small_play(hosts, tmp_path, small_failing=failing))
    first, second = progress.hosts.values()
    assert (first.phase, first.changed, first.failure) == (Phase.DONE, 1, None)
    assert second.phase is Phase.FAILED
    assert second.failure is not None
    assert second.failure.task == "Fail in the middle"
    assert "Could not get lock" in second.failure.message
    assert (tmp_path / f"{hosts[0].inventory_name}.conf").read_text().startswith("host ")
    assert end.status == "failed"
    for folder in (end.artifacts, end.artifacts.parent, end.artifacts.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_cancelling_takes_less_than_a_second(light_hosts: HostMaker, tmp_path: Path) -> None:
    hosts = tuple(parse_host(host.target) for host in light_hosts(1))
    running = RunningPlay(small_play(hosts, tmp_path, small_seconds=60))
    progress = FleetProgress(host.inventory_name for host in hosts)
    asked = None
    for event in running.events():
        if event is not None:
            progress.fold(event)
        (host,) = progress.hosts.values()
        if asked is None and host.task == "Take a while":
            asked = time.monotonic()
            running.cancel()
    end = running.wait()
    assert asked is not None
    assert time.monotonic() - asked < 1
    assert end.status == "canceled"


def test_a_problem_before_the_first_host_is_reported(light_hosts: HostMaker, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text("- hosts: all\n  tasks:\n    - no_such_module_anywhere:\n")
    hosts = tuple(parse_host(host.target) for host in light_hosts(1))
    progress = FleetProgress(host.inventory_name for host in hosts)
    running = RunningPlay(Play(playbook=broken, hosts=hosts))
    for event in running.events():
        if event is not None:
            progress.fold(event)
    end = running.wait()
    assert end.exit_code != 0
    assert "no_such_module_anywhere" in (progress.play_error or end.output)
    assert "\x1b" not in end.output

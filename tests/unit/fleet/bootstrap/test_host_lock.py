"""Which hosts the command line locks itself, and which it leaves to the play."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.nativetypes import NativeEnvironment

from mixtral_run.fleet.bootstrap import bootstrap as of_bootstrap
from mixtral_run.fleet.bootstrap import teardown as of_teardown
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest
from mixtral_run.fleet.bootstrap.host_lock import hold_locks
from mixtral_run.fleet.bootstrap.teardown import TeardownRequest
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.plays.runner import Play

ROOT = Path(__file__).parents[4]
ANSWERS = {
    "gpu-01": "echo 'held '; cat >/dev/null",
    "gpu-02": "echo 'without sudo asks ops for a password'",
    "gpu-03": "echo Welcome; exit 3",
    "gpu-04": """echo 'busy {"command": "x", "user": "bob", "host": "desk", "since": "now", "pid": 7}'""",
}
HOSTS = tuple(parse_host(f"ops@{name}:2222") for name in ANSWERS)
BLOCKED = "An answer to the test, before a play would start."


class StandInSsh:
    """STAND-IN for ssh: each host is a shell of this machine that prints one answer."""

    known_hosts = Path("known_hosts")

    def start(self, host: Host, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        assert "password" not in argv, "which password is meant for sudo, only Ansible knows"
        return subprocess.Popen(["sh", "-c", ANSWERS[host.address]], stdin=-1, stdout=-1, stderr=-1)

    def each(self, hosts: Sequence[Host], call: Callable[[Host], Any]) -> list[Any]:
        return [call(host) for host in hosts]


def _locks_itself(playbook: Path, **variables: Any) -> bool:
    """Return what the first task of `host_visit` in a playbook gets as `lock`."""
    plays = yaml.safe_load(playbook.read_text())
    tasks = [task for play in plays for each in play["tasks"] for task in each.get("block", [each])]
    visit = next(task["mixtral_run.hosts.host_visit"] for task in tasks if "mixtral_run.hosts.host_visit" in task)
    found = NativeEnvironment().from_string(visit["lock"]).render(**variables)
    assert isinstance(found, bool)
    return found


def test_the_play_locks_each_host_that_the_command_line_could_not() -> None:
    """The password of sudo may be in the inventory, in a vault or in a file, where only Ansible finds it."""
    started: list[Play] = []

    def starter(play: Play) -> Any:
        started.append(play)
        raise InterruptedError(BLOCKED)

    ssh: Any = StandInSsh()
    with hold_locks(ssh, HOSTS, "mixtral-run bootstrap") as locks:
        assert [host.address for host in locks.problems] == ["gpu-04"] and locks.notes == {}
        started.append(of_bootstrap._play(BootstrapRequest(), HOSTS[:3], ssh, locks))
        with pytest.raises(InterruptedError, match=BLOCKED):
            of_teardown._play(TeardownRequest(), None, HOSTS, ssh, False, io.StringIO(), starter, locks)
    for play in started:
        locked = [
            host.address
            for host in HOSTS[:3]
            if _locks_itself(play.playbook, inventory_hostname=host.inventory_name, **play.variables)
        ]
        assert locked == ["gpu-02", "gpu-03"]
        assert _locks_itself(play.playbook, inventory_hostname="gpu-01"), "ansible-playbook alone locks every host"
    assert {play.playbook for play in started} == {ROOT / "playbooks/bootstrap.yml", ROOT / "playbooks/teardown.yml"}

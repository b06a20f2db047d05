"""Connections of a real sshd that are dropped before a command runs, as the MaxStartups of a jump host does."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.ssh import connection as module
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.status.read_fleet import read_fleet
from tests.hosts.conftest import HostMaker
from tests.hosts.light_hosts import SSHD, LightHost


def dropping(host: LightHost, count: int, folder: Path) -> Host:
    """Return a host that drops its first `count` connections and counts all of them."""
    script = folder / "connect"
    tries = shlex.quote(str(folder / "tries"))
    script.write_text(
        f"#!/bin/sh\necho >>{tries}\n[ $(wc -l <{tries}) -gt {count} ] || exit 1\n"
        f"exec {SSHD} -i -f {shlex.quote(str(host.folder / 'sshd_config'))} 2>/dev/null\n"
    )
    script.chmod(0o755)
    return dataclasses.replace(parse_host(host.target), ssh_options=("-o", f"ProxyCommand={shlex.quote(str(script))}"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01, 0.01, 0.01))


def test_a_dropped_connection_is_tried_again(light_hosts: HostMaker, tmp_path: Path) -> None:
    (made,) = light_hosts(1)
    host = dropping(made, 2, tmp_path)
    answer = Ssh().run(host, ["cat"], stdin=b"told once")
    assert (answer.exit_code, answer.output) == (0, "told once")
    assert (tmp_path / "tries").read_text() == "\n\n\n"


def test_one_that_is_always_dropped_is_reported(light_hosts: HostMaker, tmp_path: Path) -> None:
    (made,) = light_hosts(1)
    (status,) = read_fleet([dropping(made, 99, tmp_path)])
    assert not status.reachable
    assert "cannot be reached" in (status.error or "")
    assert (tmp_path / "tries").read_text() == "\n" * 4


def test_a_command_that_fails_is_run_once(light_hosts: HostMaker, tmp_path: Path) -> None:
    (made,) = light_hosts(1)
    host = dropping(made, 0, tmp_path)
    assert Ssh().run(host, ["sh", "-c", "echo Connection lost >&2; exit 255"]).exit_code == 255
    assert (tmp_path / "tries").read_text() == "\n"

"""Names, ports, users, keys and jump hosts of ~/.ssh/config, which apply to plays and to all other connections."""

from __future__ import annotations

import getpass
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mixtral_run.cli.commands import finetune, fleet_jobs
from mixtral_run.fleet.hosts import remembered_hosts
from mixtral_run.fleet.status.read_fleet import HostStatus, read_fleet
from tests.hosts.conftest import HostMaker, Run
from tests.hosts.engine import StandInEngine
from tests.hosts.light_hosts import LightHost


@pytest.fixture(autouse=True)
def ssh_of_this_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set up a STAND-IN for a user with this home, because ssh finds it in the user database and not in HOME."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "ssh").write_text(f"#!/bin/sh\nexec /usr/bin/ssh -F '{home}/.ssh/config' \"$@\"\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.fixture
def key(home: Path) -> Path:
    """Return a key that no agent offers."""
    file = home / ".ssh/fleet key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


def takes_only(host: LightHost, key: Path) -> None:
    config = host.folder / "sshd_config"
    config.write_text(re.sub("AuthorizedKeysFile .*", f'AuthorizedKeysFile "{key}.pub"', config.read_text()))
    host.stop()
    host.start()


def entry(name: str, host: LightHost, key: Path, *more: str) -> str:
    lines = [f"Host {name}", "HostName 127.0.0.1", f"Port {host.port}", f'IdentityFile "{key}"', *more]
    return "\n  ".join(lines) + "\n"


def status_of_all() -> list[HostStatus]:
    return read_fleet(remembered_hosts())


def start_job(on: str, folder: Path) -> Result:
    words = ["--on", on, "--detach", "--load", "base", "--save", "adapter", "--mock-data"]
    return CliRunner().invoke(finetune.finetune, [*words, "--checkpoints-folder", str(folder)])


def test_name_port_user_and_key_come_from_there(
    run: Run, light_hosts: HostMaker, home: Path, key: Path, tmp_path: Path
) -> None:
    (host,) = light_hosts(1)
    takes_only(host, key)
    me = entry("gpu-01", host, key, f"User {getpass.getuser()}")
    (home / ".ssh/config").write_text(me + entry("gpu-02", host, key, "User nobody-there"))
    end, text = run("gpu-01", "gpu-02", host.target)
    # The host accepts this key only, and the name of the user is taken from the file.
    assert "1 done, 2 unreachable in" in text
    assert text.count("refuses the key") >= 2
    (done,) = (each for each in end.progress.hosts.values() if each not in end.progress.bad)
    assert (done.name, done.changed) == ("gpu-01", 1)
    (status,) = status_of_all()
    assert (status.name, status.reachable, status.error) == ("gpu-01", True, None)
    engine = StandInEngine(host)
    assert "runs on gpu-01" in start_job("gpu-01", tmp_path).output
    assert "--name finetune-" in engine.calls.read_text()
    host.reimage()
    _, text = run("gpu-01")
    assert "--accept-new-host-key gpu-01 gpu-01" in text
    end, _ = run("gpu-01", accept_new_host_key=("gpu-01",))
    assert not end.progress.bad


def test_hosts_behind_a_jump_host_are_reached(
    run: Run, light_hosts: HostMaker, home: Path, key: Path, tmp_path: Path
) -> None:
    jump, host = light_hosts(2)
    for each in (jump, host):
        takes_only(each, key)
    config, known = home / ".ssh/config", tmp_path / "known"
    own = ("GlobalKnownHostsFile none", f"UserKnownHostsFile {known}", "StrictHostKeyChecking yes")
    config.write_text(entry("bastion", jump, key, *own) + entry("gpu-01", host, key, "ProxyJump bastion"))
    _, text = run("gpu-01")
    # The user decides which jump host to trust. The host's own key plays no part in it.
    assert "The key of the jump host before gpu-01 is not" in text
    assert "--accept-new-host-key" not in text
    known.write_text(f"[127.0.0.1]:{jump.port} {(jump.folder / 'host_key.pub').read_text()}")

    def jumps() -> int:
        return (jump.folder / "sshd.log").read_text().count("Accepted publickey")

    end, _ = run("gpu-01")
    assert [each.changed for each in end.progress.hosts.values()] == [1]
    after_bootstrap = jumps()
    assert after_bootstrap >= 2  # first contact, and the play
    (status,) = status_of_all()
    assert (status.reachable, status.error) == (True, None)
    after_status = jumps()
    assert after_status > after_bootstrap
    engine = StandInEngine(host)
    assert "runs on gpu-01" in start_job("gpu-01", tmp_path).output
    assert "--name finetune-" in engine.calls.read_text()
    engine.add("finetune-1", ends_with=0)
    engine.print("finetune-1", "iteration 1\n")
    engine.end("finetune-1")
    logs = CliRunner().invoke(fleet_jobs.logs, ["finetune-1", "--on", "gpu-01"])
    assert "iteration 1" in logs.output
    assert jumps() > after_status
    jump.stop()
    (status,) = status_of_all()
    assert not status.reachable


def test_a_jump_host_with_a_new_key_is_reported_from_the_host_behind_it(
    run: Run, light_hosts: HostMaker, home: Path, key: Path, tmp_path: Path
) -> None:
    jump, host = light_hosts(2)
    for each in (jump, host):
        takes_only(each, key)
    known, name = tmp_path / "known hosts", f"[127.0.0.1]:{jump.port}"
    own = ("GlobalKnownHostsFile none", f'UserKnownHostsFile "{known}"')
    (home / ".ssh/config").write_text(
        entry("bastion", jump, key, *own) + entry("gpu-01", host, key, "ProxyJump bastion")
    )

    def trust_jump_host() -> None:
        with known.open("a") as file:
            file.write(f"{name} {(jump.folder / 'host_key.pub').read_text()}")

    trust_jump_host()
    run("gpu-01")
    # If the jump host has not changed, the new key is the host's own.
    host.reimage()
    assert "--accept-new-host-key gpu-01 gpu-01" in run("gpu-01")[1]
    jump.reimage()
    for accepted in ((), ("gpu-01",)):
        end, text = run("gpu-01", accept_new_host_key=accepted)
        assert end.progress.bad
        assert f"The jump host {name} before gpu-01 has another host key" in text
        assert "--accept-new-host-key" not in text
        assert f"expected: the key in {known}, line 1" in " ".join(text.split())
    (status,) = status_of_all()
    assert status.error is not None and f"jump host {name}" in status.error
    reported = re.search(r"if it was reimaged: (ssh-keygen .*?), then ssh gpu-01", " ".join(text.split()))
    assert reported is not None
    subprocess.run(shlex.split(reported.group(1)), check=True)
    trust_jump_host()
    end, _ = run("gpu-01", accept_new_host_key=("gpu-01",))
    assert not end.progress.bad

"""Fixtures for the tests of the operator's side: simulated hosts, a home folder with a key, and a state folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.bootstrap import bootstrap as module
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapEnd, BootstrapRequest, bootstrap
from mixtral_run.fleet.testhosts import repository
from mixtral_run.fleet.testhosts.engine import install_packages, why_no_engine
from tests.hosts.light_hosts import SSHD, LightHost, make_hosts
from tests.support.needs import missing

PLAYBOOKS = Path(__file__).parent / "playbooks"
HostMaker = Callable[[int], list[LightHost]]
Run = Callable[..., tuple[BootstrapEnd, str]]


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[None]:
    """Require a Docker engine that answers. At the end, stop the package server unless this checkout still uses it."""
    reason = why_no_engine()
    if reason is not None:
        missing(reason)
    yield
    repository.stop_unless_used()


@pytest.fixture(scope="session", autouse=True)
def sshd_installed() -> None:
    if Path(SSHD).exists():
        return
    if os.geteuid() == 0 and Path("/usr/bin/apt-get").exists():
        install_packages("openssh-server")
    if not Path(SSHD).exists():
        missing("no sshd here, and only root can install one")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a home folder with an SSH key that an agent offers, and with its own state folder."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    key = folder / ".ssh/id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    # ssh looks for keys in the home folder of the user database, not in HOME, so an agent offers this key.
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(folder / "agent")], stdout=subprocess.DEVNULL)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(folder / "agent"))
    while subprocess.run(["ssh-add", "-q", str(key)], check=False, capture_output=True).returncode:
        assert agent.poll() is None
    yield folder
    agent.terminate()
    agent.wait()


@pytest.fixture
def light_hosts(home: Path, tmp_path: Path) -> Iterator[HostMaker]:
    """Yield a function that starts a number of simulated hosts. They stop at the end of the test."""
    started: list[LightHost] = []

    def make(count: int) -> list[LightHost]:
        hosts = make_hosts(tmp_path / "hosts", count, home / ".ssh/id_ed25519.pub")
        started.extend(hosts)
        return hosts

    yield make
    for host in started:
        host.stop()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that bootstraps hosts with the small playbook and returns the result and all output."""
    monkeypatch.setattr(module, "playbook", {"bootstrap": PLAYBOOKS / "small.yml"}.__getitem__)

    def call(*targets: str, more: tuple[str, ...] = (), **settings: Any) -> tuple[BootstrapEnd, str]:
        extra = (f"small_folder={tmp_path}", f"ansible_python_interpreter={sys.executable}", *more)
        stream = io.StringIO()
        end = bootstrap(BootstrapRequest(hosts=targets, extra_vars=extra, **settings), stream)
        return end, stream.getvalue() + end.text

    return call


def inventory_name(host: LightHost) -> str:
    return f"127.0.0.1-{host.port}"


@contextmanager
def seen_arguments() -> Iterator[list[str]]:
    """Collect the arguments of all processes of this machine and its containers, ten times a second."""
    seen: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    seen.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()

"""The Docker engine that runs the test hosts: a running one, or else Debian's, which is started for the tests."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from mixtral_run.fleet.testhosts.shell import TargetError, call, start_in_background, succeeds

CACHE = Path(os.environ.get("MIXTRAL_RUN_TEST_CACHE") or Path.home() / ".cache" / "mixtral-run-tests")
"""Keys, the package repository, wheels and root filesystems that test runs share."""

START_SECONDS = 60


def why_no_engine() -> str | None:
    """Make an engine available. Return None on success, else the reason."""
    if succeeds("docker", "info"):
        return None
    if os.geteuid() != 0:
        return "no Docker engine answers, and only root can install and start one"
    if not Path("/etc/debian_version").exists() or not shutil.which("apt-get"):
        return "no Docker engine answers, and one is installed for the tests on Debian and Ubuntu only"
    try:
        _install_and_start()
    except TargetError as error:
        return f"no Docker engine could be started: {error}"
    return None


def install_packages(*names: str) -> None:
    """Install the missing ones of these Debian packages on this machine."""
    missing = [name for name in names if not _installed(name)]
    if missing:
        call("apt-get", "-o", "DPkg::Lock::Timeout=300", "update")
        call("apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "--yes", "--no-install-recommends", *missing)


def _installed(name: str) -> bool:
    # The exit code does not tell: dpkg knows of packages that others only mention.
    return call("dpkg-query", "--show", "--showformat=${db:Status-Status}", name, check=False) == "installed"


def _install_and_start() -> None:
    if not shutil.which("dockerd"):
        install_packages("docker.io", "iptables")
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / "dockerd.log"
    start_in_background(log, "dockerd")
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if succeeds("docker", "info"):
            return
        time.sleep(0.5)
    raise TargetError(f"dockerd does not answer after {START_SECONDS} s:\n{log.read_text(errors='replace')[-2000:]}")

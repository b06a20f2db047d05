"""Programs of Debian's packages for tests: unpacked into the cache and run from there. Nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mixtral_run.fleet.testhosts.engine import CACHE
from tests.support.needs import missing


def unpacked(name: str, packages: Sequence[str]) -> Path:
    """Return the folder of the unpacked packages, which is filled once. A machine with no way to them fails in CI."""
    folder = CACHE / name
    done = folder / "complete"
    if not done.exists():
        if not all(shutil.which(each) for each in ("apt-get", "dpkg")):
            missing(f"the packages {', '.join(packages)} are taken from Debian or Ubuntu")
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "debs").mkdir(parents=True)
        words = ["apt-get", "download", *packages]
        got = subprocess.run(words, cwd=folder / "debs", capture_output=True, text=True, check=False)
        if got.returncode and os.geteuid() == 0:
            # The lists of packages are missing or old.
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
            got = subprocess.run(words, cwd=folder / "debs", capture_output=True, text=True, check=False)
        if got.returncode:
            missing(f"the packages {', '.join(packages)} cannot be downloaded: {got.stderr.strip()[-300:]}")
        for deb in (folder / "debs").glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(deb), str(folder / "root")], check=True)
        done.touch()
    return folder / "root"

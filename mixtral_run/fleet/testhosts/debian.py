"""A small part of Debian's archive, from which test hosts install: what their tests need, with all dependencies.

The whole archive lists sixty thousand packages, and each apt-get of a role takes a second of CPU time to read them.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import time

from mixtral_run.fleet.testhosts.engine import CACHE
from mixtral_run.fleet.testhosts.image import FILES, UBUNTU, host_image
from mixtral_run.fleet.testhosts.shell import call

# docker.io is there for its dependencies, which the repacked engine has too; python3-apt for Ansible's own module.
PACKAGES = (
    "docker.io", "runc", "docker-registry", "git", "xfsprogs", "btrfs-progs", "prometheus-node-exporter", "nftables",
    "python3-apt",
)  # fmt: skip
SCRIPT = FILES / "debian.sh"
KEPT_DAYS = 14


def packages_of(release: str) -> str | None:
    """Return the name of the folder in CACHE with the packages of a release. Return None for a release of Ubuntu.

    Built once a week, because Debian's archive moves on. It holds Debian's own packages, and those that the host image
    has installed of Python, which one of the tests removes.
    """
    if release in UBUNTU:
        return None
    image = host_image(release)
    recipe = f"{image} {PACKAGES} {SCRIPT.read_text()} {time.strftime('%G-%V', time.gmtime())}"
    folder = CACHE / f"debian-{release}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with (CACHE / f"debian-{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "Release").exists():
            _remove_older(release)
            folder.mkdir(exist_ok=True)
            mounts = ("--volume", f"{folder}:/out", "--volume", f"{FILES}:/files:ro")
            call("docker", "run", "--rm", *mounts, image, "sh", f"/files/{SCRIPT.name}", *PACKAGES)
    # apt reads packages as a user of its own. Keys in this folder have modes of their own.
    for place in (CACHE, folder):
        place.chmod(0o755)
    return folder.name


def _remove_older(release: str) -> None:
    """Remove the folders of earlier weeks. The hosts of another checkout may still use those of the last two."""
    for old in CACHE.glob(f"debian-{release}-*"):
        if time.time() - old.stat().st_mtime > KEPT_DAYS * 86400:
            shutil.rmtree(old, ignore_errors=True)

"""Disks of test hosts on which an engine has loaded images before: a host starts with a copy of one.

Loading the kit's dependencies takes an engine half a minute, and a dozen hosts of a test run need them. The disk is the
host's only; no engine is installed on such a host, and no image on the disk is one that the kit's roles look for.
"""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

from mixtral_run.fleet.testhosts import hosts, repository
from mixtral_run.fleet.testhosts.engine import CACHE
from mixtral_run.fleet.testhosts.image import host_image
from mixtral_run.fleet.testhosts.kit_image import BASE, dependencies
from mixtral_run.fleet.testhosts.shell import call, succeeds

PREFIX = "mixtral-run-disk"


def with_images(release: str) -> str:
    """Return the volume of a disk on which BASE and `dependencies()` are loaded; make it unless the engine has it."""
    call("docker", "tag", host_image("bookworm"), BASE)
    images = [BASE, dependencies()]
    known = [call("docker", "image", "inspect", "--format", "{{.Id}}", image) for image in images]
    recipe = hashlib.sha256("\n".join([*known, host_image(release), Path(__file__).read_text()]).encode())
    volume = f"{PREFIX}-{release}-{recipe.hexdigest()[:12]}"
    with (CACHE / f"disk-{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not succeeds("docker", "volume", "inspect", volume):
            _remove_older(release)
            _make(release, images, volume)
    return volume


def _remove_older(release: str) -> None:
    for name in call("docker", "volume", "ls", "--quiet", "--filter", f"name=^{PREFIX}-{release}-").split():
        call("docker", "volume", "rm", "--force", name, check=False)


def _make(release: str, images: list[str], volume: str) -> None:
    """Have an engine of the release load the images on a host of its own, and keep what it wrote."""
    name = f"disk-{release}"
    archive = CACHE / f"images-for-{name}.tar"
    host = hosts.reimage(name, release)
    try:
        call("docker", "save", "--output", archive, *images)
        url = repository.serve((release,)).variables()["docker_repository_url"]
        host.shell(
            f"set -e; echo 'deb [trusted=yes] {url} {release} stable' > /etc/apt/sources.list.d/disk.list; "
            "apt-get -qq update; export DEBIAN_FRONTEND=noninteractive; "
            "apt-get -qq -y install --no-install-recommends docker-ce docker-ce-cli containerd.io >/dev/null; "
            f"docker load --quiet --input {hosts.SHOWN_CACHE}/{archive.name}; "
            "systemctl stop docker.socket docker.service containerd.service"
        )
        hosts.copy_disk(hosts.volume_name(name), volume)
    finally:
        archive.unlink(missing_ok=True)
        hosts.remove(name)

"""Wheels and a base image for builds without index and registry; a finished image to hand to hosts as an archive."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import mixtral_run
from mixtral_run.fleet.plays.provisioning import provisioning_folder
from mixtral_run.fleet.testhosts.engine import CACHE
from mixtral_run.fleet.testhosts.hosts import SHOWN_CACHE, WHEELHOUSE, Host, container_name, put
from mixtral_run.fleet.testhosts.image import host_image
from mixtral_run.fleet.testhosts.shell import call, pipe

PACKAGE = Path(mixtral_run.__file__).parent
# Found in a checkout and in an installed wheel alike.
DOCKERFILE = provisioning_folder() / "roles/image/files/Dockerfile"
REQUIREMENTS = provisioning_folder() / "roles/image/files/requirements.txt"
CONSTRAINTS = provisioning_folder() / "constraints.txt"
LIGHT = ("torch", "numpy", "click", "PyYAML", "rich")
"""What the acceptance program and `mixtral-run --version` need, for an image that a host builds: half the time."""
BASE = "mixtral-run-test-base:bookworm"
ARCHIVE_NAME = "mixtral-run:archive"
ARCHIVE_ON_HOST = f"{SHOWN_CACHE}/kit-image.tar"


def pinned(names: tuple[str, ...] | None = LIGHT) -> list[str]:
    """The lines of the role's requirements for these packages; None: all of them."""
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    return [line for line in lines if names is None or line.split("==")[0] in names]


def fill_wheelhouse() -> Path:
    """Download the wheels of the whole image once, for Debian 12's Python; torch for the CPU where pip finds it."""
    marker = WHEELHOUSE / f".complete-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "wheelhouse.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.exists():
            WHEELHOUSE.mkdir(parents=True, exist_ok=True)
            # Not removed and made anew: hosts that run have it mounted.
            for old in WHEELHOUSE.iterdir():
                old.unlink()
            call(
                sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", WHEELHOUSE,
                "--python-version", "3.11", "--requirement", REQUIREMENTS,
                *(("--constraint", CONSTRAINTS) if CONSTRAINTS.is_file() else ()),
            )  # fmt: skip
            marker.touch()
    return WHEELHOUSE


def image_archive() -> Path:
    """`docker save` of an image in which every verb runs; hosts see it at ARCHIVE_ON_HOST. Loads as ARCHIVE_NAME.

    Built by this machine's engine, once for each state of the kit.
    """
    kit = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    sources = [DOCKERFILE, *kit]
    recipe = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + "".join(pinned(None)).encode())
    archive = CACHE / f"kit-image-{recipe.hexdigest()[:12]}.tar"
    with (CACHE / "kit-image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            for old in CACHE.glob("kit-image-*.tar"):
                old.unlink()
            _build()
            unfinished = archive.with_suffix(".partial")
            call("docker", "save", "--output", unfinished, ARCHIVE_NAME)
            unfinished.rename(archive)
        link = CACHE / "kit-image.tar"
        if not link.is_symlink() or link.readlink() != Path(archive.name):
            link.unlink(missing_ok=True)
            link.symlink_to(archive.name)
    return archive


def _build() -> None:
    call("docker", "tag", host_image("bookworm"), BASE)
    wheelhouse = fill_wheelhouse()
    with tempfile.TemporaryDirectory(prefix="mixtral-run-context-") as folder:
        context = Path(folder)
        shutil.copy(DOCKERFILE, context)
        (context / "requirements.txt").write_text("\n".join(pinned(None)) + "\n")
        shutil.copytree(PACKAGE, context / "mixtral_run", ignore=shutil.ignore_patterns("__pycache__"))
        (context / "ca").mkdir()
        (context / "ca/README.txt").touch()
        shutil.copytree(wheelhouse, context / "wheelhouse")
        call("docker", "build", "--tag", ARCHIVE_NAME, "--build-arg", f"BASE_IMAGE={BASE}", folder)


def give_base(host: Host) -> str:
    """Load the base image of builds into a host's engine; returns its name."""
    call("docker", "tag", host_image("bookworm"), BASE)
    pipe(["docker", "save", BASE], ["docker", "exec", "--interactive", container_name(host.name), "docker", "load"])
    return BASE


def base_at_first_start(host: Host) -> None:
    """Have a bare host's engine load the base image of builds once it is installed: no registry is asked for it."""
    image = host_image("bookworm")
    archive = CACHE / f"{image.replace(':', '-')}.tar"
    with (CACHE / "base-archive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            for old in CACHE.glob("mixtral-run-target-*.tar"):
                old.unlink()
            call("docker", "tag", image, BASE)
            unfinished = archive.with_suffix(".partial")
            call("docker", "save", "--output", unfinished, BASE)
            unfinished.rename(archive)
    load = f"docker image inspect {BASE} >/dev/null 2>&1 || docker load --quiet --input {SHOWN_CACHE}/{archive.name}"
    host.run("mkdir", "-p", "/etc/systemd/system/docker.service.d")
    put(host, f"[Service]\nExecStartPost=/bin/sh -c '{load}'\n", "/etc/systemd/system/docker.service.d/base-image.conf")

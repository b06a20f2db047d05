"""Images of the test hosts, one a Debian release, built once and kept by the engine."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import shutil
import tempfile
from pathlib import Path

from mixtral_run.fleet.testhosts.engine import CACHE, install_packages
from mixtral_run.fleet.testhosts.shell import call, pipe, succeeds

UBUNTU = {"jammy": "ubuntu:22.04", "noble": "ubuntu:24.04"}
"""Releases whose root filesystem comes from a registry, where one can be reached."""
RELEASES = ("bookworm", "trixie", *UBUNTU)
MIRROR = "http://deb.debian.org/debian"
# What a server image of a cloud has and a minimal root filesystem lacks.
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "openssh-server", "sudo", "python3", "ca-certificates", "iproute2", "procps",
    "kmod", "e2fsprogs", "python3-venv",
)  # fmt: skip
FILES = Path(__file__).parent / "files"
USER = "ops"


def host_image(release: str) -> str:
    """Build the image of a release unless the engine has it; returns its name."""
    recipe = hashlib.sha256((release + MIRROR + " ".join(PACKAGES) + inspect.getsource(_furnish)).encode())
    name = f"mixtral-run-target:{release}-{recipe.hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"image-{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Two test processes would build it twice.
        if not succeeds("docker", "image", "inspect", name):
            _build(release, name)
    return name


def ssh_key() -> Path:
    """The private key that opens every test host; made at first use."""
    key = CACHE / "ssh_key"
    if not key.exists():
        install_packages("openssh-client")
        CACHE.mkdir(parents=True, exist_ok=True)
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mixtral-run test hosts", "-f", key)
    return key


def _build(release: str, name: str) -> None:
    if release not in UBUNTU:
        install_packages("debootstrap")
    with tempfile.TemporaryDirectory(prefix="mixtral-run-target-") as folder:
        root = Path(folder) / "root"
        if release in UBUNTU:
            _unpack(UBUNTU[release], root)
        else:
            call("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", release, root, MIRROR)
        _furnish(root)
        pipe(
            ["tar", "--numeric-owner", "-C", str(root), "-c", "."],
            ["docker", "import", "--change", 'CMD ["/lib/systemd/systemd"]', "-", name],
        )


def _unpack(base: str, root: Path) -> None:
    """The root filesystem of a registry's image, with PACKAGES installed."""
    context = root.parent / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(
        f"FROM {base}\nRUN apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install"
        f" --no-install-recommends {' '.join(PACKAGES)}\n"
    )
    name = f"mixtral-run-target-base:{hashlib.sha256(base.encode()).hexdigest()[:12]}"
    call("docker", "build", "--tag", name, context)
    container = call("docker", "create", name).strip()
    root.mkdir()
    pipe(["docker", "export", container], ["tar", "--numeric-owner", "-C", str(root), "-x"])
    call("docker", "rm", container)
    (root / ".dockerenv").unlink(missing_ok=True)  # by which programs know a container: a host has none


def _furnish(root: Path) -> None:
    """A login user with sudo, host keys made at first boot, an empty machine-id."""
    call("chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", USER)
    (root / "etc/sudoers.d/ops").write_text(f"{USER} ALL=(ALL) NOPASSWD:ALL\n")
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    drop_in = root / "etc/systemd/system/ssh.service.d/host-keys.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(
        "[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n"
    )
    (root / "etc/machine-id").write_text("")
    # systemd would take its machine-id from here, the same one on every host.
    (root / "var/lib/dbus/machine-id").unlink(missing_ok=True)
    shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)

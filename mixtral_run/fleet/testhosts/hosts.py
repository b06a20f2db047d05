"""Start, reimage and remove test hosts. Each one listens for SSH on its own port of 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mixtral_run.fleet.testhosts.debian import packages_of
from mixtral_run.fleet.testhosts.engine import CACHE
from mixtral_run.fleet.testhosts.image import FILES, USER, host_image, ssh_key
from mixtral_run.fleet.testhosts.shell import TargetError, call, succeeds

LABEL = f"mixtral-run-target={hashlib.sha256(str(Path(__file__)).encode()).hexdigest()[:12]}"
"""Label of the hosts of this checkout. Other checkouts may share the engine; only hosts with this label are removed in
bulk."""
# What systemd and a Docker engine need. --privileged is not used: it fails where the machine itself lacks a capability.
CAPABILITIES = (
    "SYS_ADMIN", "NET_ADMIN", "SYS_MODULE", "SYS_PTRACE", "MKNOD", "NET_RAW", "SYS_CHROOT", "AUDIT_WRITE", "SYSLOG",
)  # fmt: skip
BOOT_SECONDS = 90
WHEELHOUSE = CACHE / "wheelhouse"
SHOWN_CACHE = "/opt/test-cache"
"""Read-only mount of CACHE in every host. It holds wheels and an image archive, so that no host needs a copy."""
STANDIN_FILE = "/etc/mixtral-run-standin.json"
DATA_FOLDER = "/var/lib/docker"
"""The only folder of a host on a real file system (a volume). The rest is an overlay, which supports no swap file."""
DATA_DISK = "/mnt/data"
"""Folder of a host's data disk, if it has one."""
# Swap is the machine's, not the container's: a file left on keeps its disk from being removed.
SWAP_OFF = ("find", DATA_FOLDER, "-maxdepth", "2", "-name", "*swap*", "-type", "f", "-exec", "swapoff", "{}", ";")


# A test host lives for minutes: no package's files need to be on the disk when the power fails, and nobody reads the
# translated descriptions of sixty thousand packages, which are most of what `apt-get update` would unpack.
QUICK_PACKAGES = (
    "echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/test-host && "
    "echo 'Acquire::Languages \"none\";' > /etc/apt/apt.conf.d/90test-host"
)
# An overlay's marks of removed files are in extended attributes of root, hence SYS_ADMIN. An engine rewrites all but
# layers in place, so the rest gets files of its own.
COPY_IMAGES = """
set -e
cp -al "$1/image" "$1/overlay2" "$2"
find "$2" -path "$2/overlay2/*/diff" -prune -o -type f -exec \\
    sh -c 'for file; do cp -p "$file" "$file.copy"; mv "$file.copy" "$file"; done' sh {} +
"""


@dataclass(frozen=True)
class StandIn:
    """The GPUs that the stand-in nvidia-smi reports. A test host has no GPU."""

    gpus: int = 8
    name: str = "NVIDIA H100 80GB HBM3"
    memory_mib: int = 81559
    driver: str = "550.54.15"
    mismatch: bool = False
    nvswitch: bool = False
    compute_pids: tuple[int, ...] = ()
    gpus_in_containers: int | None = None
    """Number of GPUs that the stand-in hook shows to a container; None for all."""
    fabric_manager: str | None = None
    """Version of the running fabric manager; None if there is none."""
    fabric_state: str = "Completed"
    """fabric.state of every GPU of a host with NVSwitches."""
    bare: bool = False
    """GPUs without a driver: the role nvidia_driver installs it, and a stand-in of the kernel loads its modules."""
    mig: bool = False
    persistence: bool = True
    recovery_action: str = "None"
    """What the driver asks for on every GPU (gpu_recovery_action)."""
    serial: str = "000000000001"


@dataclass(frozen=True)
class Host:
    """A running test host."""

    name: str
    port: int
    address: str
    user: str = USER
    key: Path = field(default_factory=ssh_key)

    def run(self, *argv: str, check: bool = True) -> str:
        """Run a command on the host as root, without SSH, and return its output."""
        return call("docker", "exec", container_name(self.name), *argv, check=check)

    def shell(self, script: str, check: bool = True) -> str:
        """Run lines of sh on the host as root."""
        return self.run("sh", "-c", script, check=check)

    def inventory_entry(self) -> dict[str, object]:
        """Return Ansible's connection variables for this host."""
        options = ["-o UserKnownHostsFile=/dev/null", "-o StrictHostKeyChecking=no", "-o LogLevel=ERROR"]
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            # Where other test hosts reach it.
            "address_among_hosts": self.address,
            "ansible_user": self.user,
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": " ".join(options),
        }


def volume_name(name: str) -> str:
    """Return the engine's name of a host's disk."""
    return f"mixtral-run-{name}-data"


def container_name(name: str) -> str:
    """Return the engine's name of a host's container."""
    return f"mixtral-run-{name}"


def start(
    name: str,
    release: str = "bookworm",
    standin: StandIn | None = None,
    disk: str | None = None,
    data_disk: str | None = None,
) -> Host:
    """Start a bare host, wait until SSH answers.

    standin: None for a host without GPUs and driver. disk: a volume of `disks.py`, of which the host's is a copy.
    data_disk: a volume at DATA_DISK that outlives the host, as a disk of its own does.
    """
    image = host_image(release)
    container, volume, packages = container_name(name), volume_name(name), packages_of(release)
    if not _runs(container):
        remove(name)  # what a killed run left: its disk is not a bare host's
        if disk is not None:
            copy_disk(disk, volume)
    argv = ["docker", "run", "--detach", "--name", container, "--hostname", name, "--label", LABEL]
    argv += [word for capability in CAPABILITIES for word in ("--cap-add", capability)]
    argv += ["--security-opt", "seccomp=unconfined", "--security-opt", "systempaths=unconfined"]
    # Loop devices, for filesystems that the machine itself has none of.
    argv += ["--device-cgroup-rule", "c 10:237 rmw", "--device-cgroup-rule", "b 7:* rmw"]
    argv += ["--tmpfs", "/run:exec", "--tmpfs", "/run/lock", "--stop-signal", "SIGRTMIN+3"]
    argv += ["--volume", f"{volume}:{DATA_FOLDER}", "--publish", "127.0.0.1::22"]
    argv += ["--volume", f"{data_disk}:{DATA_DISK}"] if data_disk else []
    WHEELHOUSE.mkdir(parents=True, exist_ok=True)
    argv += ["--volume", f"{CACHE}:{SHOWN_CACHE}:ro"]
    argv += ["--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw"]
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        argv += ["--cgroupns", "private", image]
    else:
        # Debian 13's systemd boots on the old cgroup hierarchy of this machine only when told so.
        argv += [image, "/lib/systemd/systemd", "systemd.unified_cgroup_hierarchy=0",
                 "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]  # fmt: skip
    call(*argv)
    host = wait_for_boot(name)
    host.shell(f"mkdir -p ~{USER}/.ssh && printf '%s' '{ssh_key().with_suffix('.pub').read_text()}' "
               f"> ~{USER}/.ssh/authorized_keys && chown -R {USER} ~{USER}/.ssh && {QUICK_PACKAGES}")  # fmt: skip
    if packages is not None:
        host.shell(f"echo 'deb [trusted=yes] file:{SHOWN_CACHE}/{packages} ./' > /etc/apt/sources.list")
    set_standin(host, standin)
    return host


def find(name: str) -> Host:
    """Return a host that was started before. Raises TargetError if there is none."""
    container = container_name(name)
    port = call("docker", "port", container, "22/tcp").split()[0].rsplit(":", 1)[1]
    address = call("docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", container).strip()
    return Host(name=name, port=int(port), address=address)


def set_standin(host: Host, standin: StandIn | None) -> None:
    """Change the GPUs that a running host reports."""
    if standin is None:
        host.shell(f"rm -f {STANDIN_FILE} /dev/nvidia-nvswitch0 /usr/bin/nvidia-smi")
        return
    if not standin.bare:
        put(host, (FILES / "nvidia-smi").read_text(), "/usr/bin/nvidia-smi", "755")
    if standin.serial == StandIn.serial:
        standin = replace(standin, serial=f"{abs(hash(host.name)) % 10**12:012d}")
    put(host, json.dumps({key: value for key, value in asdict(standin).items() if value is not None}), STANDIN_FILE)
    host.shell("touch /dev/nvidia-nvswitch0" if standin.nvswitch else "rm -f /dev/nvidia-nvswitch0")
    if standin.bare:
        _take_modules(host)
        return
    if standin.fabric_manager is None:
        host.shell("systemctl disable --now nvidia-fabricmanager 2>/dev/null; "
                   "rm -f /etc/systemd/system/nvidia-fabricmanager.service /usr/bin/nv-fabricmanager")  # fmt: skip
        return
    put(host, f"#!/bin/sh\n# STAND-IN\necho 'Fabric Manager version is : {standin.fabric_manager}'\n",
        "/usr/bin/nv-fabricmanager", "755")  # fmt: skip
    put(host, "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n",
        "/etc/systemd/system/nvidia-fabricmanager.service")  # fmt: skip
    host.shell("systemctl daemon-reload; systemctl start nvidia-fabricmanager")


def _take_modules(host: Host) -> None:
    """Give a host a stand-in of a kernel that loads the modules of the test repository's driver."""
    put(host, (FILES / "driver/kernel-modules").read_text(), "/usr/local/bin/modprobe", "755")
    host.run("modprobe", "--take-modules")


def put(host: Host, text: str, path: str, mode: str = "644") -> None:
    """Write a file on the host."""
    with tempfile.NamedTemporaryFile("w", dir=_cache(), suffix=".put") as file:
        file.write(text)
        file.flush()
        call("docker", "cp", file.name, f"{container_name(host.name)}:{path}")
    host.run("chown", "root:root", path)
    host.run("chmod", mode, path)


def _cache() -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def wait_for_boot(name: str) -> Host:
    """Return a host once SSH answers. Raises TargetError with the journal's end if it does not boot."""
    host = find(name)
    until = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < until:
        state = host.run("systemctl", "is-system-running", check=False).strip()
        if (
            state in ("running", "degraded")
            and host.run("systemctl", "is-active", "ssh", check=False).strip() == "active"
        ):
            return host
        time.sleep(0.3)
    journal = host.shell("systemctl --failed --no-legend; journalctl -n 30 --no-pager", check=False)
    raise TargetError(f"The test host {name} has not booted after {BOOT_SECONDS} s (systemd: {state}).\n{journal}")


def reimage(
    name: str,
    release: str = "bookworm",
    standin: StandIn | None = None,
    disk: str | None = None,
    data_disk: str | None = None,
) -> Host:
    """Replace a host by one of the same name with a new host key and machine-id, and an empty disk or a copy of one.

    data_disk: as for `start`; it keeps what is on it.
    """
    remove(name)
    return start(name, release, standin, disk, data_disk)


def copy_disk(source: str, target: str) -> None:
    """Make a volume with the images that an engine has stored on another; the engines must not run.

    Layers become hard links: an engine never writes into a layer, and gigabytes would be copied for each host.
    """
    call("docker", "volume", "create", target)
    mounts = call("docker", "volume", "inspect", "--format", "{{.Mountpoint}}", source, target).split()
    (volumes,) = {str(Path(mount).parents[1]) for mount in mounts}
    old, new = (f"/volumes/{Path(mount).relative_to(volumes)}" for mount in mounts)
    call("docker", "run", "--rm", "--cap-add", "SYS_ADMIN", "--volume", f"{volumes}:/volumes", host_image("bookworm"),
         "sh", "-c", COPY_IMAGES, "copy", old, new)  # fmt: skip


def remove(name: str) -> None:
    """Remove a host and its disk, if they exist. Raises TargetError if the disk cannot be removed."""
    container = container_name(name)
    succeeds("docker", "exec", container, *SWAP_OFF)
    call("docker", "rm", "--force", "--volumes", container, check=False)
    _remove_disk(name)


def _remove_disk(name: str) -> None:
    discard = ("docker", "volume", "rm", "--force", volume_name(name))
    if succeeds(*discard):
        return
    # The host ended with its engine while its swap was on: whoever sees the disk can switch it off.
    call("docker", "run", "--rm", "--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined",
         "--volume", f"{volume_name(name)}:{DATA_FOLDER}", host_image("bookworm"), *SWAP_OFF)  # fmt: skip
    call(*discard)


def _runs(container: str) -> bool:
    return call("docker", "inspect", "--format", "{{.State.Running}}", container, check=False).strip() == "true"


def left_of(name: str) -> set[str]:
    """Return the names of a host's container and disk that exist in the engine, running or not."""
    containers = call("docker", "ps", "--all", "--format", "{{.Names}}").split()
    return {container_name(name), volume_name(name)} & {*containers, *call("docker", "volume", "ls", "--quiet").split()}


def running() -> list[str]:
    """Return the names of all test hosts that this checkout started."""
    names = call("docker", "ps", "--all", "--filter", f"label={LABEL}", "--format", "{{.Names}}").split()
    return [name.removeprefix("mixtral-run-") for name in names]

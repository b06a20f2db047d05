"""Functions that read the state of a host. None of them changes anything or raises because something is absent."""

from __future__ import annotations

import glob
import json
import os
import re
import stat

from . import services
from .commands import MISSING, TIMED_OUT, run
from .files import RECORD_FOLDER, explain, read_text
from .gpu import driver_parts, gpu_driver, rdma

GPU_FIELDS = (
    "index",
    "name",
    "uuid",
    "memory.total",
    "driver_version",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
)
CDI_FOLDERS = ("/etc/cdi", "/var/run/cdi")


def os_release(path="/etc/os-release"):
    """Return {"id": "ubuntu", "version": "22.04", "codename": "jammy", "name": …}. Missing fields are empty strings."""
    values = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', read_text(path, ""), re.MULTILINE))
    return {
        "id": values.get("ID", ""),
        "version": values.get("VERSION_ID", ""),
        "codename": values.get("VERSION_CODENAME", ""),
        "name": values.get("PRETTY_NAME", ""),
    }


def architecture():
    """Return Debian's name of the architecture, such as amd64 or arm64."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def memory():
    """Return RAM and active swap in GiB."""
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text("/proc/meminfo", ""), re.MULTILINE))
    return {
        "ram_gib": round(int(kib.get("MemTotal", 0)) / 2**20, 1),
        "swap_gib": round(int(kib.get("SwapTotal", 0)) / 2**20, 1),
    }


def disk(path):
    """Return free and total GiB and the filesystem type of the nearest existing parent of `path`."""
    there = path
    while not os.path.isdir(there) and there != "/":
        there = os.path.dirname(there)
    figures = os.statvfs(there)
    return {
        "path": path,
        "free_gib": round(figures.f_bavail * figures.f_frsize / 2**30, 1),
        "total_gib": round(figures.f_blocks * figures.f_frsize / 2**30, 1),
        "filesystem": filesystem(there),
    }


def held_gib(path, folders):
    """Return the GiB that `folders` occupy on the filesystem of `path`, or 0 if two minutes do not suffice to measure."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    device = os.stat(path).st_dev
    real = {os.path.realpath(each) for each in folders if os.path.isdir(each)}
    here = sorted(each for each in real if os.stat(each).st_dev == device)
    if not here:
        return 0
    answer = run(["du", "--summarize", "--one-file-system", "--total", "--block-size=1", "--"] + here, timeout=120)
    total = re.search(r"^(\d+)\ttotal$", answer.out, re.MULTILINE)
    return round(int(total.group(1)) / 2**30, 1) if total else 0


def filesystem(path):
    """Return the type of the filesystem that contains `path`, found by the longest mount point above it."""
    return _mount(path)[1]


def mount_of(path):
    """Return device number, mount point and type of the filesystem of the nearest existing parent of `path`."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return (os.stat(path).st_dev,) + _mount(path)


def _mount(path):
    best, kind = "", "unknown"
    real = os.path.realpath(path)
    for line in read_text("/proc/self/mounts", "").splitlines():
        _, mount, each = line.split(" ")[:3]
        mount = mount.replace("\\040", " ")
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, each
    return best, kind


def gpus(timeout=30):
    """Return {"gpus": [...], "driver": "550.54.15", "error": None, "sick": False}.

    error: the message of nvidia-smi, or the reason why there is none. sick: nvidia-smi is installed but fails or hangs;
    such a host must not be treated as one without GPUs.
    """
    query = run(["nvidia-smi", "--query-gpu=" + ",".join(GPU_FIELDS), "--format=csv,noheader,nounits"], timeout=timeout)
    found = {"gpus": [], "driver": None, "error": None, "sick": query.code not in (0, MISSING)}
    if query.code == MISSING:
        found["error"] = "nvidia-smi is not installed: no NVIDIA driver"
    elif query.code == TIMED_OUT:
        found["error"] = "nvidia-smi hangs (no answer within {} s): the driver or a GPU is sick, see dmesg".format(
            timeout
        )
    elif query.code:
        found["error"] = " ".join((query.out + query.err).split())
    else:
        rows = [[cell.strip() for cell in line.split(",")] for line in query.out.splitlines() if line.strip()]
        found["gpus"] = [_gpu(row) for row in rows if len(row) == len(GPU_FIELDS)]
        found["driver"] = rows[0][4] if found["gpus"] else None
    return found


def why_sick(state, host):
    """Return the error message for an installed driver that does not answer, from the result of gpus()."""
    return explain(
        "The NVIDIA driver does not answer: the host is not taken for one without GPUs.",
        where=host,
        expected="`nvidia-smi` ends with 0",
        found=state["error"],
        next_step="repair the driver (`dmesg | grep -i nvrm`; after an upgrade, reboot); on a host without GPUs, remove its packages",
    )


def _gpu(row):
    return {
        "index": int(row[0]),
        "name": row[1],
        "uuid": row[2],
        "memory_gib": round(_number(row[3]) / 1024, 1),
        "temperature_celsius": _number(row[5]),
        "ecc_errors": _number(row[6]),
    }


def _number(text):
    try:
        return float(text)
    except ValueError:
        return 0.0


def clock_synchronized():
    """Return True or False as reported by the host's time service, or None if none answers."""
    answer = run(["timedatectl", "show", "--property=NTPSynchronized", "--value"], timeout=15)
    return {"yes": True, "no": False}.get(answer.out.strip())


def engine():
    """Return the running engine's version, runtimes, CDI devices, container count and root, or "error" if it fails."""
    answer = run(["docker", "info", "--format", "{{json .}}"], timeout=30)
    found = {"version": None, "runtimes": [], "cdi_devices": [], "containers_running": 0, "root": None, "error": None,
             "containerd_images": False}  # fmt: skip
    try:
        info = json.loads(answer.out)
    except ValueError:
        info = {}
    if answer.code or not info.get("ServerVersion"):
        errors = "; ".join(info.get("ServerErrors") or []) or answer.err.strip()
        found["error"] = "docker is not installed" if answer.code == MISSING else errors
        return found
    found["version"] = info["ServerVersion"]
    found["runtimes"] = sorted(info.get("Runtimes") or {})
    found["cdi_devices"] = [
        each.get("ID") for each in info.get("DiscoveredDevices") or [] if each.get("Source") == "cdi"
    ]
    found["containers_running"] = info.get("ContainersRunning", 0)
    found["root"] = info.get("DockerRootDir")
    found["containerd_images"] = "io.containerd.snapshotter" in str(info.get("DriverStatus"))
    return found


def engine_version():
    """Return the running engine's version, or None. Unlike `docker info`, it starts no plugin of the command line."""
    answer = run(["docker", "version", "--format", "{{.Server.Version}}"], timeout=30)
    return None if answer.code else answer.out.strip() or None


def cdi(folders=CDI_FOLDERS):
    """Return path, number of GPUs and driver version of the NVIDIA CDI spec. All are None if there is no spec."""
    for folder in folders:
        for path in sorted(
            glob.glob(os.path.join(folder, "nvidia*.y*ml")) + glob.glob(os.path.join(folder, "nvidia*.json"))
        ):
            try:
                text = read_text(path, "")
            except PermissionError:  # the engine reports the devices that it found in it
                continue
            if "nvidia.com/gpu" not in text:
                continue
            # Names are on separate lines in both YAML and JSON. A GPU is listed by its index and often by its UUID too.
            indices = set(re.findall(r'["\']?name["\']?:\s*["\']?(\d+)["\']?\s*(?:,|$)', text, re.MULTILINE))
            driver = re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)", text)
            return {"path": path, "gpus": len(indices), "driver": driver.group(1) if driver else None}
    return {"path": None, "gpus": None, "driver": None}


def toolkit_version():
    answer = run(["nvidia-ctk", "--version"], timeout=15)
    match = re.search(r"version (\d+\.\d+\.\d+)", answer.out)
    return match.group(1) if match else None


def swap_files():
    """Return the active swap as [{"path": …, "size_gib": …}]."""
    rows = [line.split() for line in read_text("/proc/swaps", "").splitlines()[1:]]
    return [{"path": row[0], "size_gib": round(int(row[2]) / 2**20, 2)} for row in rows]


def identity():
    """Return the values that distinguish this installation of the host from an earlier one of the same name."""
    key = (read_text("/etc/ssh/ssh_host_ed25519_key.pub") or "").split()
    return {
        "machine_id": read_text("/etc/machine-id", "").strip(),
        "ssh_host_key": key[1] if len(key) > 1 else "",
    }


def images(label="org.mixtral-run.inputs"):
    """Return the images with the kit's label as [{"id", "tag"}]."""
    answer = run(
        ["docker", "images", "--filter", "label=" + label, "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"], timeout=30
    )
    return [dict(zip(("id", "tag"), line.split(" ", 1))) for line in answer.out.splitlines()]


def records(folder=RECORD_FOLDER):
    """Return the kit's records of this host by name. A damaged record, or one that only root can read, is None."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.json"))):
        try:
            found[os.path.basename(path)[: -len(".json")]] = json.loads(read_text(path, "{}"))
        except (ValueError, PermissionError):
            found[os.path.basename(path)[: -len(".json")]] = None
    return found


def unreadable(paths):
    """Return those of the paths that exist and that this user may not read, or may not reach."""
    found = []
    for path in paths:
        try:
            needed = os.R_OK | os.X_OK if stat.S_ISDIR(os.stat(path).st_mode) else os.R_OK
            if not os.access(path, needed, effective_ids=True):
                found.append(path)
        except PermissionError:
            found.append(path)
        except OSError:
            continue
    return found


def machine(disks=()):
    """Return the state of the host without the kit's additions. The Docker engine is not queried."""
    driver, kernel = gpus(), os.uname().release
    modes = gpu_driver.modes() if driver["gpus"] else {}
    return {
        "os": os_release(),
        "kernel": kernel,
        "architecture": architecture(),
        "identity": identity(),
        "memory": memory(),
        "disks": [disk(path) for path in disks],
        "gpus": driver["gpus"],
        "driver": {
            "user": driver["driver"],
            "kernel": gpu_driver.kernel_driver(),
            "error": driver["error"],
            **gpu_driver.modules_on_disk(kernel),
            **driver_parts.for_next_boot(),
        },
        "gpu_modes": {name: modes.get(name, []) for name in ("persistence_mode", "mig.mode.current")},
        "fabric_manager": gpu_driver.fabric_manager(modes, [gpu["name"] for gpu in driver["gpus"]]),
        "rdma": rdma.read(),
        "clock_synchronized": clock_synchronized(),
        "time_services": services.time_services(),
        "firewall": services.firewall(),
        "swap": swap_files(),
    }


def host(disks=()):
    """Return the complete state: `machine` plus engine, images, toolkit, CDI spec and records."""
    return dict(
        machine(disks),
        engine=engine(),
        images=images(),
        toolkit=toolkit_version(),
        cdi=cdi(),
        records=records(),
    )

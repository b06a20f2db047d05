"""Load the NVIDIA driver's kernel modules, and replace loaded ones without a reboot if nothing uses them."""

from __future__ import annotations

import glob
import os
import re
import time

from ..commands import last_lines, run
from ..files import read_text
from . import driver_parts, gpu_driver

# A module goes after those that use it; gdrdrv and nvidia_fs are optional and belong to others.
UNLOAD = ("nvidia_fs", "gdrdrv", "nvidia_peermem", "nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")
LOAD = ("nvidia-uvm", "nvidia-modeset")
MODULES = "/sys/module"
UNITS = ("nvidia-persistenced", "nvidia-fabricmanager", "nvidia-dcgm", "nvidia-dcgm-exporter")
"""Services that hold the device files. They are stopped before the modules are unloaded, and started again."""
HELD_BY_SERVICES = ("nvidia", "nvidia_uvm", "nvidia_modeset")
"""Modules that UNITS use too. Programs that use them have the device files open: driver_parts.why_held() names them."""
BUILD_SECONDS, INITRAMFS_SECONDS, FABRIC_SECONDS = 1800, 900, 120
UNTRAINED = ("Not Started", "In Progress")


def build(release, wanted):
    """Let DKMS build the modules of the version `wanted` for a kernel. Return why it has none after that, or an empty text.

    The scripts of NVIDIA's packages end with 0 even if the build failed or was skipped, so the result is checked. If
    `wanted` is None, any version will do.
    """
    answer = run(["dkms", "autoinstall", "-k", release], timeout=BUILD_SECONDS)
    version = driver_parts.module_field(release, "version")
    if version and wanted in (None, version):
        return ""
    if version:
        told = last_lines(answer, 2) or "dkms built nothing"
        return "the module of kernel {} is of version {}, the library of {}: {}".format(release, version, wanted, told)
    if not driver_parts.has_headers(release):
        return "/lib/modules/{}/build is missing: the kernel's headers are not installed".format(release)
    return _make_log() or last_lines(answer, 4) or "dkms built nothing"


def _make_log():
    """Return the last lines of the newest log of a build by DKMS."""
    logs = sorted(glob.glob("/var/lib/dkms/nvidia/*/build/make.log"), key=os.path.getmtime)
    return "\n".join(read_text(logs[-1], "").splitlines()[-4:]) if logs else ""


def load(target):
    """Load the modules. Return why they cannot be loaded, or an empty text. target: name in messages."""
    if driver_parts.nouveau_loaded():
        answer = run(["modprobe", "--remove", "nouveau"])
        if driver_parts.nouveau_loaded():
            return "nouveau holds the GPUs: {}".format(last_lines(answer, 1))
    answer = run(["modprobe", "nvidia"], timeout=120)
    if answer.code:
        return "{}: {}".format(target, last_lines(answer, 2))
    for name in LOAD:
        run(["modprobe", name], timeout=120)
    return ""


def reload(board, warn):
    """Replace the loaded modules by those on disk. Return why that is not possible now, or an empty text.

    The kernel itself refuses to unload a module in use, so no program loses its GPUs. Services that were stopped are
    started again in any case. Modules of others that stood on NVIDIA's are loaded again: one that does not come back is no
    reason for a reboot, and warn(text) is called.
    """
    active, standing = _stop_services(), _present()
    try:
        why = _unload() or load("the module on disk")
        if why:
            return why
        for name in reversed(standing):
            answer = run(["modprobe", name], timeout=120)
            if answer.code:
                warn("the module {} was loaded and does not come back: {}".format(name, last_lines(answer, 1)))
        return _reset(board)
    finally:
        for unit in active:
            run(["systemctl", "start", unit], timeout=180)


def missing(names):
    """Return those of the modules that are not in the kernel."""
    return [name for name in names if not os.path.isdir(os.path.join(MODULES, name))]


def load_for_nvlink5(check_mode):
    """Load what the fabric manager of NVLink 5 needs. The kit's file in modules-load.d does it at each boot.

    Return the modules that were loaded, and why one cannot be, or an empty text.
    """
    wanted = missing(gpu_driver.NVLINK5_MODULES)
    for name in [] if check_mode else wanted:
        answer = run(["modprobe", name], timeout=120)
        if answer.code:
            return [], last_lines(answer, 1) or name
    still = [] if check_mode else missing(wanted)  # a module may be a part of the kernel
    return [name for name in wanted if name not in still], ""


def _present():
    absent = missing(UNLOAD)
    return [name for name in UNLOAD if name not in absent]


def why_no_fabric(seconds=FABRIC_SECONDS):
    """Wait until the fabric manager has trained the fabric. Return which GPUs are not in it, or an empty text.

    Only states that say so count: drivers and boards before Hopper, and a GPU that does not answer, have none.
    """
    until = time.monotonic() + seconds
    while True:
        modes = gpu_driver.modes()
        states = modes.get("fabric.state", [])
        rows = list(zip(states, modes.get("fabric.status", [""] * len(states))))
        waiting = [
            "GPU {}: {}{}".format(number, state, ", " + status if status else "")
            for number, (state, status) in enumerate(rows)
            if state in UNTRAINED or (state == "Completed" and not _is_fine(status))
        ]
        if not waiting or time.monotonic() >= until:
            return "; ".join(waiting)
        time.sleep(2)


def _is_fine(status):
    return status == "Success" or status in gpu_driver.NO_FABRIC or status.startswith("[")


def in_use(root="/", without=()):
    """Return which module programs use, or an empty text. A module also counts those modules that stand on it.

    without: modules that are left out, such as HELD_BY_SERVICES while the services run.
    It is read before the first module is unloaded: with some of them gone, the others would serve no program, and the
    modules of another version cannot be loaded beside them.
    """
    for name in UNLOAD:
        if name in without:
            continue
        folder = os.path.join(root, "sys/module", name)
        count = int(read_text(os.path.join(folder, "refcnt"), "0") or 0)
        standing = len(glob.glob(os.path.join(folder, "holders", "*")))
        if count > standing:
            return "the module {} is in use ({} times)".format(name, count - standing)
    return ""


def _unload():
    why = in_use()
    if why:
        return why
    gone = []
    for name in _present():
        answer = run(["rmmod", name], timeout=120)
        if answer.code:
            for each in reversed(gone):
                run(["modprobe", each], timeout=120)
            return "the kernel does not let go of {}: {}".format(name, last_lines(answer, 1))
        gone.append(name)
    return ""


def _reset(board):
    """Reset the GPUs of a board with switches: from Hopper on, its fabric manager starts after a reset only."""
    if board not in ("nvswitch", "nvlink5"):
        return ""
    answer = run(["nvidia-smi", "-r"], timeout=300)
    return "the GPUs cannot be reset: {}".format(last_lines(answer, 1)) if answer.code else ""


def unload():
    """Unload the modules for good. Return why that is not possible, with the services started again, or an empty text."""
    active = _stop_services()
    why = _unload()
    for unit in active if why else []:
        run(["systemctl", "start", unit], timeout=180)
    return why


def _stop_services():
    """Stop the services that hold the device files. Return the names of those that ran."""
    active = [unit for unit in UNITS if run(["systemctl", "is-active", unit]).out.strip() == "active"]
    if active:
        run(["systemctl", "stop"] + active, timeout=180)
    return active


def next_step(why):
    """Return what to do about a module that does not load, by the kernel's words."""
    if re.search("Key was rejected|Required key not available", why):
        return (
            "Secure Boot refuses the module: switch Secure Boot off, or set nvidia_driver_source: ubuntu, whose modules are "
            "signed, or enroll the key of DKMS at the console with `mokutil --import`"
        )
    if "No such device" in why:
        return "the kernel sees no GPU for this driver: `lspci -nn -d 10de:`; GPUs older than Turing need proprietary modules"
    return "look at `sudo dmesg | grep -i nvrm` on the host"

"""Load the NVIDIA driver's kernel modules, and replace loaded ones without a reboot if nothing uses them."""

from __future__ import annotations

import glob
import os
import re

from ..commands import last_lines, run
from ..files import read_text
from . import driver_parts

# A module goes after those that use it; gdrdrv and nvidia_fs are optional and belong to others.
UNLOAD = ("nvidia_fs", "gdrdrv", "nvidia_peermem", "nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")
LOAD = ("nvidia-uvm", "nvidia-modeset")
UNITS = ("nvidia-persistenced", "nvidia-fabricmanager", "nvidia-dcgm", "nvidia-dcgm-exporter")
"""Services that hold the device files. They are stopped before the modules are unloaded, and started again."""
BUILD_SECONDS, INITRAMFS_SECONDS = 1800, 900


def build(release):
    """Let DKMS build the modules for a kernel. Return why there is no module after that, or an empty text.

    The scripts of NVIDIA's packages end with 0 even if the build failed or was skipped, so the result is checked.
    """
    answer = run(["dkms", "autoinstall", "-k", release], timeout=BUILD_SECONDS)
    if driver_parts.module_field(release, "version"):
        return ""
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


def reload(board):
    """Replace the loaded modules by those on disk. Return why that is not possible now, or an empty text.

    The kernel itself refuses to unload a module in use, so no program loses its GPUs. Services that were stopped are
    started again in any case.
    """
    active = [unit for unit in UNITS if run(["systemctl", "is-active", unit]).out.strip() == "active"]
    if active:
        run(["systemctl", "stop"] + active, timeout=180)
    try:
        return _unload() or load("the module on disk") or _reset(board)
    finally:
        for unit in active:
            run(["systemctl", "start", unit], timeout=180)


def in_use(root="/"):
    """Return which module programs use, or an empty text. A module also counts those modules that stand on it.

    It is read before the first module is unloaded: with some of them gone, the others would serve no program, and the
    modules of another version cannot be loaded beside them.
    """
    for name in UNLOAD:
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
    for name in UNLOAD:
        if not os.path.isdir("/sys/module/" + name):
            continue
        answer = run(["rmmod", name], timeout=120)
        if answer.code:
            for each in LOAD:  # those that went before it
                run(["modprobe", each], timeout=120)
            return "the kernel does not let go of {}: {}".format(name, last_lines(answer, 1))
    return ""


def _reset(board):
    """Reset the GPUs of a board with switches: from Hopper on, its fabric manager starts after a reset only."""
    if board not in ("nvswitch", "nvlink5"):
        return ""
    answer = run(["nvidia-smi", "-r"], timeout=300)
    return "the GPUs cannot be reset: {}".format(last_lines(answer, 1)) if answer.code else ""


def unload():
    """Unload the modules for good, as far as nothing uses them. Return True if none is left."""
    active = [unit for unit in UNITS if run(["systemctl", "is-active", unit]).out.strip() == "active"]
    if active:
        run(["systemctl", "stop"] + active, timeout=180)
    if in_use():
        return False
    present = [name for name in UNLOAD if os.path.isdir("/sys/module/" + name)]
    return all(run(["rmmod", name], timeout=120).code == 0 for name in present)


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

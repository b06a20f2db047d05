"""Readings of the NVIDIA driver beyond the table of GPUs: NVSwitches, modules on disk, modes of the GPUs, fabric."""

from __future__ import annotations

import glob
import os
import re

from ..commands import MISSING, run
from ..files import read_text

NVIDIA_VENDOR, MELLANOX_VENDOR, BRIDGE_CLASS = "0x10de", "0x15b3", "0x0680"
MODES = ("persistence_mode", "mig.mode.current", "fabric.state", "fabric.status")
NO_FABRIC = ("", "N/A", "[N/A]", "[Not Supported]", "Not Supported")
# What the fabric manager of HGX B200 and B300 needs beside the driver: kernel modules and a package.
NVLINK5_MODULES, NVLINK5_PACKAGE = ("mlx5_ib", "ib_umad"), "nvlsm"


def nvswitch(root="/"):
    """Return "pci" for NVSwitches on PCI, "nvlink5" for those of HGX B200 and B300, or None.

    The control node /dev/nvidia-nvswitchctl proves nothing: hosts without NVSwitches have it too. The NVSwitches of
    NVLink 5 are no PCI devices of NVIDIA's: they are behind ConnectX bridges that name themselves in their VPD.
    """
    if _glob(root, "dev/nvidia-nvswitch[0-9]*") or _glob(root, "proc/driver/nvidia-nvswitch/devices/*"):
        return "pci"
    for vendor in _glob(root, "sys/bus/pci/devices/*/vendor"):
        bridge = read_text(os.path.join(os.path.dirname(vendor), "class"), "").startswith(BRIDGE_CLASS)
        if bridge and read_text(vendor, "").strip() == NVIDIA_VENDOR:
            return "pci"
    # On a bare host mlx5_ib is not loaded yet, and the bridges are found on PCI alone.
    for path in _glob(root, "sys/class/infiniband/*/device/vpd") or _of_vendor(root, MELLANOX_VENDOR, "vpd"):
        try:
            with open(path, "rb") as file:
                if b"SW_MNG" in file.read(1 << 16):
                    return "nvlink5"
        except OSError:  # only root can read it
            continue
    return None


def _of_vendor(root, vendor, name):
    """Return the paths of a file of each PCI device of a vendor."""
    found = _glob(root, "sys/bus/pci/devices/*/vendor")
    return [os.path.join(os.path.dirname(path), name) for path in found if read_text(path, "").strip() == vendor]


def active_nvlinks():
    """Return the number of active NVLinks of all GPUs, or None if nvidia-smi does not list them."""
    answer = run(["nvidia-smi", "nvlink", "-s"], timeout=30)
    links = re.findall(r"^\s*Link \d+: *(.*)$", answer.out, re.MULTILINE)
    # nvidia-smi may list the links of most GPUs and fail all the same, for example by a GPU that is lost.
    return None if answer.code and not links else sum("inactive" not in state.lower() for state in links)


def needs_fabric_manager(kind, fabric_states, gpu_names):
    """Return True if the host needs the fabric manager.

    Args:
        kind: the result of nvswitch(). It is None on HGX B200 too if only root can read the bridges' VPD.
        fabric_states: fabric.state of each GPU.
        gpu_names: names of the GPUs. The switches of GB200 and GB300 are in the rack, and its own hosts manage them.
    """
    if kind is not None:
        return True
    in_rack = any(word.startswith("GB") for name in gpu_names for word in re.split(r"[\s-]", name))
    return not in_rack and any(state not in NO_FABRIC for state in fabric_states)


def fabric_manager(modes, gpu_names, root="/"):
    """Return the state of the fabric manager and of the fabric. modes: the result of modes()."""
    version = run(["nv-fabricmanager", "--version"], timeout=15)
    number = re.search(r"(\d+\.\d+(?:\.\d+)?)", version.out)
    active = run(["systemctl", "is-active", "nvidia-fabricmanager"], timeout=15)
    kind, states = nvswitch(root), modes.get("fabric.state", [])
    return {
        "nvswitch": needs_fabric_manager(kind, states, gpu_names),
        "nvlink5": kind == "nvlink5",
        "active": active.out.strip() == "active",
        "version": number.group(1) if number else None,
        "state": states,
        "status": modes.get("fabric.status", []),
        "missing": _missing_for_nvlink5(root) if kind == "nvlink5" else [],
    }


def _missing_for_nvlink5(root):
    missing = ["kernel module " + name for name in NVLINK5_MODULES if not _glob(root, "sys/module/" + name)]
    answer = run(["dpkg-query", "--show", "--showformat=${db:Status-Status}", NVLINK5_PACKAGE], timeout=15)
    if answer.code != MISSING and answer.out.strip() != "installed":
        missing.append("package " + NVLINK5_PACKAGE)
    return missing


def modes(timeout=30):
    """Return a list of values per field of MODES, one value per GPU. A field that the driver does not know is left out.

    One unknown field makes nvidia-smi refuse the whole query, so the query is repeated without it.
    """
    wanted = list(MODES)
    while wanted:
        words = ["nvidia-smi", "--query-gpu=" + ",".join(wanted), "--format=csv,noheader"]
        answer = run(words, timeout=timeout)
        refused = re.search(r'Field "([^"]+)" is not a valid field to query', answer.out + answer.err)
        if not refused or refused.group(1) not in wanted:
            break
        wanted.remove(refused.group(1))
    if not wanted or answer.code:
        return {}
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.out.splitlines() if line.strip()]
    rows = [row for row in rows if len(row) == len(wanted)]
    return {field: [row[number] for row in rows] for number, field in enumerate(wanted)} if rows else {}


def kernel_driver(path="/proc/driver/nvidia/version"):
    """Return the version of the loaded NVIDIA kernel module, or None if none is loaded."""
    match = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", read_text(path, ""))
    return match.group(1) if match else None


def modules_on_disk(running, root="/"):
    """Return the versions of the NVIDIA module that modprobe would load now and after a reboot into the newest kernel.

    on_disk, newest_kernel and in_newest_kernel are None where they are unknown. A version is an empty string if that
    kernel has no NVIDIA module.
    """
    newest = newest_kernel([os.path.basename(path) for path in _glob(root, "boot/vmlinuz-*")])
    on_disk = _module_version(running)
    next_one = on_disk if newest == running else _module_version(newest) if newest else None
    return {"on_disk": on_disk, "newest_kernel": newest, "in_newest_kernel": next_one}


def newest_kernel(names):
    """Return the release that boots by default, from file names such as vmlinuz-6.8.0-45-generic; None for no names."""
    releases = [name[len("vmlinuz-") :] for name in names if re.match(r"vmlinuz-\d", name)]
    return max(releases, key=lambda release: [int(part) for part in re.findall(r"\d+", release)], default=None)


def _module_version(release):
    """Return the version of a kernel's NVIDIA module, "" if the kernel has none, None if modinfo is not installed."""
    answer = run(["modinfo", "-k", release, "-F", "version", "nvidia"], timeout=15)
    return None if answer.code == MISSING else answer.out.strip() if answer.code == 0 else ""


def _glob(root, pattern):
    return sorted(glob.glob(os.path.join(root, pattern)))

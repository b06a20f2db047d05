"""InfiniBand and RoCE devices of a host, and the way in which they read and write the memory of GPUs."""

from __future__ import annotations

import glob
import os

from ..files import read_text


def read(root="/", kernel=None):
    """Return the devices with an active port ({"name", "rate", "link_layer"}), and `gpudirect`.

    gpudirect: "DMA-BUF", which needs the open kernel modules and Linux 5.12; "nvidia-peermem", which needs that module;
    or None: NCCL then copies through the memory of the host.
    """
    devices = []
    for port in sorted(glob.glob(os.path.join(root, "sys/class/infiniband/*/ports/*"))):
        if "ACTIVE" not in _line(port, "state"):
            continue
        device = os.path.dirname(os.path.dirname(port))
        if _is_bridge(device):
            continue
        name = os.path.basename(device)
        devices.append({"name": name, "rate": _line(port, "rate"), "link_layer": _line(port, "link_layer")})
    return {"devices": devices, "gpudirect": _gpudirect(root, kernel or os.uname().release)}


def shortfall(state, _limits):
    """Yield the shortfall of a host whose RDMA devices cannot reach the memory of its GPUs."""
    found = state["rdma"]
    if found["devices"] and state["gpus"] and not found["gpudirect"]:
        remedy = (
            "use the driver's open kernel modules (DMA-BUF), or `sudo modprobe nvidia-peermem` and name it in "
            "/etc/modules-load.d; jobs on several hosts run without it, only slower"
        )
        names = ", ".join(device["name"] for device in found["devices"])
        yield "warn", "GPUDirect RDMA by DMA-BUF or nvidia-peermem", "neither, for {}".format(names), remedy


def _gpudirect(root, kernel):
    module = read_text(os.path.join(root, "proc/driver/nvidia/version"), "")
    numbers = [int(part) for part in kernel.split("-")[0].split(".")[:2] if part.isdigit()]
    if "Open Kernel Module" in module and numbers >= [5, 12]:
        return "DMA-BUF"
    peers = ("sys/module/nvidia_peermem", "sys/kernel/mm/memory_peers/nv_mem/version")
    return "nvidia-peermem" if any(os.path.exists(os.path.join(root, path)) for path in peers) else None


def _is_bridge(device):
    """Return True for a device that leads to the NVSwitches of NVLink 5: it carries no data. Only root can see that."""
    try:
        with open(os.path.join(device, "device/vpd"), "rb") as file:
            return b"SW_MNG" in file.read(1 << 16)
    except OSError:
        return False


def _line(folder, name):
    try:
        return (read_text(os.path.join(folder, name), "") or "").strip()
    except OSError:
        return ""

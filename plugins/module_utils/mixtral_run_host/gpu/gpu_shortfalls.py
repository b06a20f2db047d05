"""Pure functions that compare driver, fabric and modes of the GPUs with what jobs need."""

from __future__ import annotations

import re

from . import driver_states, rdma, since_acceptance
from .gpu_driver import NO_FABRIC

HOLD = (
    "dpkg --get-selections '*nvidia*' 'linux-image-*' 'linux-headers-*' 'linux-modules-*' 'linux-generic*' "
    "| grep -v deinstall | cut -f1 | xargs sudo apt-mark hold"
)
"""Command that holds all parts that must agree. `nvidia-driver-*` alone is a metapackage: its libraries, modules and
fabric manager, and the kernel, would stay free."""


def version(text):
    """Return a version as a tuple of integers for comparison: "22.04" → (22, 4)."""
    return tuple(int(part) for part in re.findall(r"\d+", str(text or "")))


def driver(state, limits):
    """Yield the shortfall of a missing or old driver."""
    found = state["driver"]["user"]
    wanted = "NVIDIA driver {} or newer"
    remedy = "`mixtral-run bootstrap HOST --tags nvidia_driver -e nvidia_driver_branch={}` installs it".format(
        limits["driver_supported"]
    )
    if found is None and limits["num_gpus"] > 0:
        yield wanted.format(limits["driver_version"]), state["driver"]["error"] or "none", remedy
    elif found and version(found) < version(limits["driver_version"]):
        yield wanted.format(limits["driver_version"]), "driver {}".format(found), remedy
    elif found and version(found) < version(limits["driver_supported"]):
        why = "driver {}, of a branch that gets no fixes any more".format(found)
        yield "warn", wanted.format(limits["driver_supported"]), why, remedy


def agreement(state, _limits):
    """Yield the shortfall of a library that differs from the loaded module."""
    values = state["driver"]
    mismatch = values["error"] and "mismatch" in values["error"].lower()
    differ = values["kernel"] and values["user"] and values["kernel"] != values["user"]
    if mismatch or differ:
        found = values["error"] if mismatch else "kernel module {}, library {}".format(values["kernel"], values["user"])
        remedy = "an unattended upgrade replaced the library under the loaded module: reboot, then hold driver and kernel: `{}`"
        yield "kernel module and user-space library of one version", found, remedy.format(HOLD)


def next_boot(state, _limits):
    """Yield what the next reboot would change or break. The host works until then."""
    values, fabric = state["driver"], state["fabric_manager"]
    if not values["kernel"]:
        return
    parts = driver_states.Parts(
        loaded=values["kernel"],
        on_disk=values["on_disk"],
        library=values.get("library"),
        running_kernel=state.get("kernel"),
        newest_kernel=values["newest_kernel"],
        in_newest_kernel=values["in_newest_kernel"],
        headers=values.get("headers"),
        fabric_manager=fabric["version"],
        needs_fabric_manager=fabric["nvswitch"],
        secure_boot=values.get("secure_boot"),
        signer=values.get("signer"),
    )
    found = {each.name: each for each in driver_states.findings(parts) if each.when in _COMING}
    manager = found.pop("fabric_manager_split", None)
    found.pop("kernel_pending", None)  # a newer kernel with the same driver breaks nothing
    for each in found.values():
        stays, before = "", ""
        if manager:
            wanted = driver_states.coming(parts) or parts.on_disk or parts.library
            stays, before = "; {} stays".format(manager.found), install_fabric_manager(wanted) + ", then "
        yield "warn", each.expected, each.found + stays, before + each.step


_COMING = (driver_states.NEXT_BOOT, driver_states.PENDING)


def lock(state, _limits):
    """Yield a warning of driver packages that an unattended upgrade may change in any night."""
    names = state["driver"].get("open_to_upgrades") or []
    if names:
        listed = ", ".join(names[:3]) + (" and {} more".format(len(names) - 3) if len(names) > 3 else "")
        found = "unattended upgrades may change {}: library and loaded module would differ until a reboot".format(
            listed
        )
        remedy = "hold driver and kernel: `{}`, or list them in Unattended-Upgrade::Package-Blacklist".format(HOLD)
        yield "warn", "packages of the driver that no night's upgrade changes", found, remedy


def fabric_manager(state, _limits):
    """Yield the shortfalls of the fabric manager and of the fabric on a host with NVSwitches."""
    fabric, installed = state["fabric_manager"], state["driver"]["user"]
    if not fabric["nvswitch"]:
        return
    install = (
        install_fabric_manager(installed)
        if installed
        else "install the driver first, then fabric manager of its version"
    )
    if fabric["missing"]:
        remedy = "`sudo apt-get install nvlsm infiniband-diags linux-modules-extra-$(uname -r) && sudo modprobe -a mlx5_ib ib_umad`"
        wanted = "what the fabric manager of NVLink 5 needs"
        yield wanted, "missing: {}".format(", ".join(fabric["missing"])), remedy + ", then restart the fabric manager"
    if not fabric["active"]:
        remedy = install + ", then `sudo systemctl enable --now nvidia-fabricmanager`"
        yield "nvidia-fabricmanager running (this host has NVSwitches)", "it is not running", remedy
    elif installed and fabric["version"] != installed:
        remedy = install + ": with another version CUDA fails with error 802"
        found = "fabric manager {}".format(fabric["version"])
        yield "fabric manager {}, as the driver".format(installed), found, remedy
    else:
        yield from _fabric(fabric)


def _fabric(fabric):
    """Yield the shortfall of GPUs that have not joined the fabric. Drivers before 535 do not report it."""
    bad = [
        "GPU {}: {}, {}".format(number, state, status)
        for number, (state, status) in enumerate(zip(fabric["state"], fabric["status"]))
        if state not in NO_FABRIC and (state, status) != ("Completed", "Success")
    ]
    if bad:
        remedy = (
            "look at `journalctl -u nvidia-fabricmanager` and /var/log/fabricmanager.log; when idle, stop it, "
            "`sudo nvidia-smi -r`, and start it"
        )
        yield "fabric.state Completed and fabric.status Success on each GPU", "; ".join(bad), remedy


def install_fabric_manager(driver_version):
    """Return the command that installs the fabric manager of a driver.

    The revision after the version differs among repositories (-1, -1ubuntu1, -2, -0ubuntu0.24.04.1), so apt gets a
    pattern. From 580 on, the name of the package in NVIDIA's repository has no branch; in Ubuntu's it still has.
    """
    branch = driver_version.split(".")[0]
    if version(driver_version) < (580,):
        return "`sudo apt-get install 'nvidia-fabricmanager-{}={}-*'`".format(branch, driver_version)
    return (
        "`sudo apt-get install 'nvidia-fabricmanager={0}-*'` (in Ubuntu's own archive nvidia-fabricmanager-{1})".format(
            driver_version, branch
        )
    )


def mig(state, _limits):
    """Yield the shortfall of GPUs that are cut into MIG instances."""
    cut = [str(number) for number, mode in enumerate(state["gpu_modes"]["mig.mode.current"]) if mode == "Enabled"]
    if cut:
        remedy = (
            "when the GPUs are idle: `sudo nvidia-smi -mig 0 -i {}`; if it answers that the change is pending, reset the "
            "GPU or reboot"
        ).format(",".join(cut))
        yield "whole GPUs: jobs use no MIG instances", "MIG mode on GPU {}".format(", ".join(cut)), remedy


def persistence(state, _limits):
    """Yield a warning of GPUs without persistence mode: the driver lets go of an idle GPU and its state."""
    off = [str(number) for number, mode in enumerate(state["gpu_modes"]["persistence_mode"]) if mode == "Disabled"]
    if off:
        remedy = (
            "enable nvidia-persistenced with --persistence-mode (`sudo systemctl edit nvidia-persistenced`); "
            "`sudo nvidia-smi -pm 1` lasts until the next reboot"
        )
        yield "warn", "persistence mode on each GPU", "off on GPU {}".format(", ".join(off)), remedy


def remarks(state):
    """Return what `status` warns of besides the driver's own error.

    These are the differences since the acceptance, fabric, next boot, lock, MIG, persistence and RDMA.
    """
    items = [item for check in (next_boot, lock, mig, persistence, rdma.shortfall) for item in check(state, {})]
    items += _fabric(state["fabric_manager"])
    pairs = list(since_acceptance.differences(state)) + [item[-3:-1] for item in items]
    return ["{}; expected {}".format(found, wanted) for wanted, found in pairs]

"""Pure functions that compare the state of a host with the requirements and list all shortfalls at once."""

from __future__ import annotations

import re
from collections import namedtuple

Shortfall = namedtuple("Shortfall", "check level expected found remedy")
CHECKS = (
    "os",
    "architecture",
    "gpus",
    "gpu_memory",
    "driver",
    "driver_agreement",
    "fabric_manager",
    "ram",
    "disk",
    "engine",
    "dns",
    "mirrors",
    "clock",
)
TEXTS = ("architecture", "driver_version")
"""Limits that are no numbers, even if they look like one."""
LEGACY = {("ubuntu", "20.04"): "Ubuntu 20.04 is past its end of life: upgrade when you can"}


def with_numbers(limits):
    """Return the limits with numbers that are text as numbers: `-e NAME=VALUE` of Ansible passes text only."""
    return {
        name: float(value)
        if isinstance(value, str) and re.match(r"-?\d+(\.\d+)?$", value) and name not in TEXTS
        else value
        for name, value in limits.items()
    }


def version(text):
    """Return a version as a tuple of integers for comparison: "22.04" → (22, 4)."""
    return tuple(int(part) for part in re.findall(r"\d+", str(text or "")))


def collect(state, limits, levels):
    """Return every shortfall of `state` against `limits`, except those whose check has the level "skip".

    A checker may lower the level "fail" to "warn", as for RAM that the host's existing swap makes up for.
    """
    found = []
    for check in CHECKS:
        level = levels.get(check, "fail")
        if level == "skip":
            continue
        for item in _CHECKERS[check](state, limits):
            own, expected, seen, remedy = item if len(item) == 4 else (None,) + item
            found.append(Shortfall(check, own if own and level == "fail" else level, expected, seen, remedy))
    return found


def render(host, shortfalls):
    """Return the message that lists the shortfalls and the next steps."""
    count = len(shortfalls)
    lines = ["{} is not ready: {} shortfall{}.".format(host, count, "" if count == 1 else "s")]
    for item in shortfalls:
        lines.append("  - {}: expected {}; found {}".format(item.check, item.expected, item.found))
        lines.append("    next: {}".format(item.remedy))
    lines.append(
        "  nothing was changed; a check can be set to warn or skip: preflight_checks: {{{}: warn}}".format(
            shortfalls[0].check
        )
    )
    return "\n".join(lines)


def _os(state, limits):
    release = state["os"]
    least = limits["os"].get(release["id"])
    wanted = " or ".join("{} {} or newer".format(name, number) for name, number in sorted(limits["os"].items()))
    if least is None or version(release["version"]) < version(least):
        found = release["name"] or "no /etc/os-release"
        yield wanted, found, "install the host with one of these systems"
    elif (release["id"], release["version"]) in LEGACY:
        yield (
            "warn",
            "a system that still gets security updates",
            release["name"],
            LEGACY[release["id"], release["version"]],
        )


def _architecture(state, limits):
    if state["architecture"] != limits["architecture"]:
        yield limits["architecture"], state["architecture"], "use an x86-64 host; the images are built for no other"


def _gpus(state, limits):
    if len(state["gpus"]) < limits["num_gpus"]:
        found = "{} GPUs".format(len(state["gpus"]))
        if not state["gpus"] and state["driver"]["error"]:
            found += " ({})".format(state["driver"]["error"])
        remedy = "look at `nvidia-smi -L` and `dmesg | grep -i xid`; for fewer GPUs set preflight_num_gpus"
        yield "{:g} GPUs".format(limits["num_gpus"]), found, remedy


def _gpu_memory(state, limits):
    # A GPU sold with 32 GB shows a little less, because the firmware reserves some memory.
    least = limits["gpu_memory_gib"] * 0.95
    small = [
        "GPU {} has {:g} GiB".format(gpu["index"], gpu["memory_gib"])
        for gpu in state["gpus"]
        if gpu["memory_gib"] < least
    ]
    if small:
        yield "{:g} GiB on each GPU".format(limits["gpu_memory_gib"]), "; ".join(small), "use GPUs with more memory"


def _driver(state, limits):
    driver = state["driver"]
    wanted = "NVIDIA driver {} or newer".format(limits["driver_version"])
    remedy = "install a newer driver: `sudo ubuntu-drivers install --gpgpu` or NVIDIA's repository, then reboot"
    if driver["user"] is None and limits["num_gpus"] > 0:
        yield wanted, driver["error"] or "none", remedy
    elif driver["user"] and version(driver["user"]) < version(limits["driver_version"]):
        yield wanted, "driver {}".format(driver["user"]), remedy


def _driver_agreement(state, _limits):
    driver = state["driver"]
    mismatch = driver["error"] and "mismatch" in driver["error"].lower()
    differ = driver["kernel"] and driver["user"] and driver["kernel"] != driver["user"]
    if mismatch or differ:
        found = driver["error"] if mismatch else "kernel module {}, library {}".format(driver["kernel"], driver["user"])
        remedy = "an unattended upgrade replaced the library under the loaded module: reboot, then hold the driver's packages"
        yield "kernel module and user-space library of one version", found, remedy


def _fabric_manager(state, _limits):
    fabric, driver = state["fabric_manager"], state["driver"]["user"]
    if not fabric["nvswitch"]:
        return
    install = (
        _install_fabric_manager(driver) if driver else "install the driver first, then fabric manager of its version"
    )
    if not fabric["active"]:
        remedy = install + ", then `sudo systemctl enable --now nvidia-fabricmanager`"
        yield "nvidia-fabricmanager running (this host has NVSwitches)", "it is not running", remedy
    elif driver and fabric["version"] != driver:
        remedy = install + ": with another version CUDA fails with error 802"
        yield "fabric manager {}, as the driver".format(driver), "fabric manager {}".format(fabric["version"]), remedy


def _install_fabric_manager(driver):
    branch = driver.split(".")[0]
    if version(driver) < (580,):
        return "`sudo apt-get install nvidia-fabricmanager-{}={}-1`".format(branch, driver)
    # Since 580 the package name in NVIDIA's repository has no branch (gpu-driver-container#451), in Ubuntu's it still has.
    return "`sudo apt-get install nvidia-fabricmanager={}-1` (in Ubuntu's own archive nvidia-fabricmanager-{})".format(
        driver, branch
    )


def _ram(state, limits):
    ram, swap, least = state["memory"]["ram_gib"], state["memory"]["swap_gib"], limits["ram_gib"]
    # Memory modules of 128 GB show as about 125 GiB, because the firmware and the kernel reserve a part.
    if ram + _planned_swap(ram, limits) >= least * 0.95:
        return
    wanted, found = "{:g} GiB of RAM".format(least), "{:g} GiB of RAM and {:g} GiB of swap".format(ram, swap)
    if ram + swap >= least * 0.95:
        yield "warn", wanted, found, "it will do, but conversion to a layout with few files is slower"
    else:
        yield wanted, found, "add RAM, or let the swap role make up for it: swap_size_gib, swap_target_gib"


def _planned_swap(ram, limits):
    """Return the GiB of swap that the swap role will create. A negative setting means RAM's difference to the target."""
    planned = float(limits["planned_swap_gib"])
    return planned if planned >= 0 else max(0, float(limits["swap_target_gib"]) - ram)


def _disk(state, limits):
    for each in state["disks"]:
        held = each.get("held_gib", 0)
        if each["free_gib"] + held < limits["free_gib"]:
            found = "{:g} GiB free ({})".format(each["free_gib"], each["filesystem"])
            if held:
                found += ", and {:g} GiB that checkpoints and HF cache hold there, counted as free".format(held)
            yield (
                "{:g} GiB free under {}".format(limits["free_gib"], each["path"]),
                found,
                "free some space, or put checkpoints on a larger disk: hf_cache_checkpoint_folder, preflight_disk_paths",
            )


def _engine(state, _limits):
    """Yield the conflicts between the host's Docker engine and the docker role's settings."""
    yield from state.get("engine_conflicts", [])


def _dns(state, _limits):
    for name, error in state["dns"].items():
        if error:
            yield "the name {} resolves".format(name), error, "set a resolver: `resolvectl status`, /etc/resolv.conf"


def _mirrors(state, _limits):
    for url, error in state["mirrors"].items():
        if error:
            yield "{} answers".format(url), error, "open the way to it, or name your own mirror or proxy in group_vars"


def _clock(state, limits):
    offset, limit = state["clock_offset_seconds"], limits["clock_offset_seconds"]
    wanted = "a clock within {:g} s".format(limit)
    remedy = "`sudo timedatectl set-ntp true`; signatures and certificates fail under a wrong clock"
    if offset is not None and abs(offset) > limit:
        yield wanted, "{:+.0f} s against a mirror's".format(offset), remedy
    elif offset is None and not state["clock_synchronized"]:
        yield wanted, "no time service has synchronized it", remedy


_CHECKERS = {
    "os": _os,
    "architecture": _architecture,
    "gpus": _gpus,
    "gpu_memory": _gpu_memory,
    "driver": _driver,
    "driver_agreement": _driver_agreement,
    "fabric_manager": _fabric_manager,
    "ram": _ram,
    "disk": _disk,
    "engine": _engine,
    "dns": _dns,
    "mirrors": _mirrors,
    "clock": _clock,
}

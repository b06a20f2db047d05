"""Pure functions that compare the state of a host with the requirements and list all shortfalls at once."""

from __future__ import annotations

import re
from collections import namedtuple

from . import services, space
from .gpu import gpu_shortfalls, rdma
from .gpu.gpu_shortfalls import version

Shortfall = namedtuple("Shortfall", "check level expected found remedy")
CHECKS = (
    "os",
    "architecture",
    "gpus",
    "gpu_memory",
    "driver",
    "driver_agreement",
    "driver_next_boot",
    "driver_lock",
    "fabric_manager",
    "mig",
    "persistence",
    "login",
    "ram",
    "disk",
    "engine",
    "dns",
    "mirrors",
    "clock",
    "time_sync",
    "firewall",
    "rdma",
)
TEXTS = ("architecture", "driver_version", "driver_supported")
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


def _ram(state, limits):
    ram, swap, least = state["memory"]["ram_gib"], state["memory"]["swap_gib"], limits["ram_gib"]
    # Memory modules of 128 GB show as about 125 GiB, because the firmware and the kernel reserve a part.
    if ram + planned_swap(ram, limits) >= least * 0.95:
        return
    wanted, found = "{:g} GiB of RAM".format(least), "{:g} GiB of RAM and {:g} GiB of swap".format(ram, swap)
    if ram + swap >= least * 0.95:
        yield "warn", wanted, found, "it will do, but conversion to a layout with few files is slower"
    else:
        yield wanted, found, "add RAM, or let the swap role make up for it: swap_size_gib, swap_target_gib"


def planned_swap(ram, limits):
    """Return the GiB of swap that the swap role will create. A negative setting means RAM's difference to the target."""
    planned = float(limits["planned_swap_gib"])
    return planned if planned >= 0 else max(0, float(limits["swap_target_gib"]) - ram)


def _disk(state, _limits):
    return space.shortfalls(state["space"])


def _login(state, _limits):
    if state["printed_at_login"]:
        remedy = (
            "let the start-up files of the login user (~/.bashrc, /etc/bash.bashrc) print in interactive shells only: "
            "`case $- in *i*) ;; *) return ;; esac` before what prints"
        )
        yield "warn", "a login shell that prints nothing for a command", repr(state["printed_at_login"][:80]), remedy


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
    "driver": gpu_shortfalls.driver,
    "driver_agreement": gpu_shortfalls.agreement,
    "driver_next_boot": gpu_shortfalls.next_boot,
    "driver_lock": gpu_shortfalls.lock,
    "fabric_manager": gpu_shortfalls.fabric_manager,
    "mig": gpu_shortfalls.mig,
    "persistence": gpu_shortfalls.persistence,
    "login": _login,
    "ram": _ram,
    "disk": _disk,
    "engine": _engine,
    "dns": _dns,
    "mirrors": _mirrors,
    "clock": _clock,
    "time_sync": services.time_shortfall,
    "firewall": services.firewall_shortfall,
    "rdma": rdma.shortfall,
}

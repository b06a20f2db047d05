"""Time services and firewalls of a host, and what preflight says about them."""

from __future__ import annotations

import re

from .commands import run

TIME_SERVICES = ("chrony", "chronyd", "systemd-timesyncd", "ntpsec", "ntp", "ntpd", "openntpd")


def time_services():
    """Return the time services that run. chrony and chronyd are one, under the names of two distributions."""
    answer = run(["systemctl", "is-active"] + [name + ".service" for name in TIME_SERVICES], timeout=15)
    states = answer.out.split()
    if len(states) != len(TIME_SERVICES):
        return []
    active = [name for name, state in zip(TIME_SERVICES, states) if state == "active"]
    # A unit may have an alias in this list.
    families = {"chronyd": "chrony", "ntpd": "ntp"}
    return sorted({families.get(name, name) for name in active} - ({"ntp"} if "ntpsec" in active else set()))


def firewall():
    """Return {"name": "ufw", "admits": [...]} for a firewall that is on and refuses what no rule allows, else None.

    admits: addresses and networks that may connect to every port.
    """
    status = run(["ufw", "status"], timeout=15)
    if not status.code and re.search(r"^Status: active", status.out, re.MULTILINE):
        rows = re.findall(r"^Anywhere(?: on \S+)?\s+ALLOW(?: IN)?\s+(\S+)", status.out, re.MULTILINE)
        return {"name": "ufw", "admits": sorted({row for row in rows if row != "Anywhere"})}
    state = run(["firewall-cmd", "--state"], timeout=15)
    if not state.code and "running" in state.out.split():
        sources = run(["firewall-cmd", "--zone=trusted", "--list-sources"], timeout=15).out.split()
        return {"name": "firewalld", "admits": sorted(sources)}
    return None


def time_shortfall(state, _limits):
    """Yield a warning of a host whose clock nobody keeps, or two services at once."""
    running = state["time_services"]
    if state["clock_offset_seconds"] is None and not state["clock_synchronized"]:
        return  # the check of the clock reports it
    if len(running) > 1:
        remedy = "keep one: `sudo systemctl disable --now NAME`"
        yield "warn", "one time service", " and ".join(running), remedy
    elif not running and not state["clock_synchronized"]:
        remedy = "`sudo apt-get install chrony`, or the role health with health_time_service: chrony"
        yield "warn", "a time service that keeps the clock", "none", remedy
    elif running and state["clock_synchronized"] is False:
        look = "`chronyc sources`" if running == ["chrony"] else "`timedatectl timesync-status`"
        remedy = "look at {}: the time servers may be out of reach (UDP port 123)".format(look)
        yield "warn", "a clock that {} has synchronized".format(running[0]), "not yet synchronized", remedy


def firewall_shortfall(state, limits):
    """Yield a warning of a firewall that would keep out the other hosts of a job."""
    found = state["firewall"]
    if limits["num_hosts"] < 2 or found is None or found["admits"]:
        return
    commands = {
        "ufw": "`sudo ufw allow from NETWORK_OF_THE_HOSTS`",
        "firewalld": "`sudo firewall-cmd --permanent --zone=trusted --add-source=NETWORK_OF_THE_HOSTS && sudo firewall-cmd --reload`",
    }
    yield (
        "warn",
        "the other hosts may connect to every port: NCCL chooses its ports itself, and torchrun listens on 29400",
        "{} is on, and admits no other host to all ports".format(found["name"]),
        commands[found["name"]] + "; jobs on one host need nothing",
    )

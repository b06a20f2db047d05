"""Which hosts a command line means."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import (
    Host,
    find_hosts,
    hosts_of_inventory,
    limit_hosts,
    remembered_hosts,
    told_by_inventory,
)


def hosts_of(words: tuple[str, ...], inventory: Path | None, limit: str | None) -> tuple[Host, ...]:
    """The hosts that a command line means: named ones, an inventory's, else the fleet that was bootstrapped before.

    Raises ConfigError where it means none.
    """
    if inventory is not None:
        from mixtral_run.fleet.plays.runner import read_inventory  # only here: it loads ansible_runner

        if not inventory.exists():
            raise ConfigError(
                "There is no such inventory.", where=str(inventory), next_command="mixtral-run bootstrap ubuntu@gpu-01"
            )
        listed = hosts_of_inventory(read_inventory(inventory), inventory)
        named = find_hosts(words, listed)
        unknown = [host.name for host in named if host not in listed]
        if unknown:
            raise ConfigError("The inventory does not have these hosts.", where=str(inventory), problems=unknown)
        found = named or listed
    else:
        known = remembered_hosts()
        found = find_hosts(words, known) if words else known
    if not found:
        raise ConfigError(
            "No host is named, and none was bootstrapped from here before.",
            expected="[user@]name[:port] …, or -i INVENTORY",
            next_command="mixtral-run bootstrap ubuntu@gpu-01",
        )
    return limit_hosts(found, limit)


def inventory_of(hosts: Sequence[Host]) -> Path | None:
    """The inventory that all of the hosts come from; None where they come from none.

    Raises ConfigError for hosts of several: one play reads one inventory.
    """
    groups: dict[str | None, list[str]] = {}
    for host in hosts:
        groups.setdefault(host.inventory, []).append(host.name)
    if len(groups) > 1:
        raise ConfigError(
            "The hosts do not come from one inventory: set them up one after the other.",
            problems=[
                "mixtral-run bootstrap "
                + (shlex.join(["-i", inventory, "--limit", ",".join(names)]) if inventory else " ".join(names))
                for inventory, names in groups.items()
            ],
        )
    (inventory,) = groups
    return Path(inventory) if inventory else None


def refuse_lost_variables(hosts: Sequence[Host]) -> None:
    """Raise ConfigError for hosts that were set up with an inventory and are now named in a way that leaves it out.

    Setting them up without their variables would undo what those say.
    """
    known = remembered_hosts()
    before = {host.target: told for host in hosts if (told := told_by_inventory(host, known))}
    if before:
        raise ConfigError(
            "These hosts were set up with an inventory, whose variables would not count any more.",
            expected="the inventory, with another user in its ansible_user; or -i ANOTHER, to leave it",
            problems=[f"{target}: mixtral-run bootstrap {told.bootstrap_words}" for target, told in before.items()],
        )

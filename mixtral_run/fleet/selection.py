"""Selection of the hosts for a command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.host_patterns import Groups, choose_hosts
from mixtral_run.fleet.hosts import (
    Host,
    groups_of,
    hosts_of_inventory,
    inventory_entry_of,
    remembered_hosts,
    with_recorded_folders,
)


def hosts_of(words: tuple[str, ...], inventory: Path | None, limit: str | None) -> tuple[Host, ...]:
    """Return the hosts for a command line: named hosts, hosts of an inventory, or else the whole remembered fleet.

    words, limit: names and Ansible host patterns (host_patterns.py). Groups are those of the inventory.

    Raises ConfigError if no host is selected.
    """
    groups: Groups = {}
    if inventory is not None:
        from mixtral_run.fleet.plays.runner import read_inventory  # imported here because it loads ansible_runner

        if not inventory.exists():
            raise ConfigError(
                "There is no such inventory.", where=str(inventory), next_command="mixtral-run bootstrap ubuntu@gpu-01"
            )
        listing = read_inventory(inventory)
        known, groups = with_recorded_folders(hosts_of_inventory(listing, inventory)), groups_of(listing)
    else:
        known = remembered_hosts()
    found = choose_hosts(words, known, groups, others=inventory is None) if words else known
    if not found:
        raise ConfigError(
            "No host is named, and none was bootstrapped from this machine before.",
            expected="[user@]name[:port] …, or -i INVENTORY",
            next_command="mixtral-run bootstrap ubuntu@gpu-01",
        )
    return choose_hosts([limit], found, groups, others=False) if limit else tuple(found)


def inventory_of(hosts: Sequence[Host]) -> Path | None:
    """Return the inventory that all hosts come from, or None if they come from none.

    Raises ConfigError if they come from several: a play reads one inventory.
    """
    groups: dict[str | None, list[str]] = {}
    for host in hosts:
        groups.setdefault(host.inventory, []).append(host.name)
    if len(groups) > 1:
        raise ConfigError(
            "The hosts come from several inventories: set them up one inventory at a time.",
            problems=[
                "mixtral-run bootstrap "
                + (shlex.join(["-i", inventory, "--limit", ",".join(names)]) if inventory else " ".join(names))
                for inventory, names in groups.items()
            ],
        )
    (inventory,) = groups
    return Path(inventory) if inventory else None


def refuse_lost_variables(hosts: Sequence[Host]) -> None:
    """Raise ConfigError for hosts that were set up with an inventory and are now named without it.

    A bootstrap without the inventory's variables would undo their effects.
    """
    known = remembered_hosts()
    before = {host.target: entry for host in hosts if (entry := inventory_entry_of(host, known))}
    if before:
        raise ConfigError(
            "These hosts were set up with an inventory, whose variables would no longer apply.",
            expected="the inventory, with another user in its ansible_user; or -i ANOTHER, to replace it",
            problems=[
                f"{target}: mixtral-run bootstrap {entry.bootstrap_arguments}" for target, entry in before.items()
            ],
        )

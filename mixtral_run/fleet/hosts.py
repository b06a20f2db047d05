"""Hosts: named by the user (`ubuntu@gpu-01:2222`), read from an inventory, or remembered from an earlier bootstrap."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.home_folder import expanded
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.state import read_json, state_folder, write_json

GROUP = "mixtral_hosts"
"""Inventory group whose hosts the playbooks set up."""

FOLDER_VARIABLES = {"checkpoints_folder": "hf_cache_checkpoint_folder", "hf_home": "hf_cache_home"}
"""Fields of a Host and the variables of the role hf_cache that they hold."""

_NAME_IN_TEMPLATE = re.compile(r"{{\s*([A-Za-z_]\w*)\s*}}")
_MOST_TEMPLATES = 5
"""Variables that may name each other in turn."""

_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\\-]*\$?")
# RFC 1123 names and aliases of ~/.ssh/config. ssh would read a leading dash as an option.
_ADDRESS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?")


@dataclass(frozen=True)
class Host:
    """A machine and its SSH settings. ~/.ssh/config supplies the settings that are None."""

    name: str
    """Name that the user gives the host; unique in a fleet."""
    address: str
    user: str | None = None
    port: int | None = None
    identity_file: str | None = None
    ssh_options: tuple[str, ...] = ()
    """Further ssh arguments, from ansible_ssh_common_args in an inventory."""
    inventory: str | None = None
    """Path of the user's inventory that names the host. Ansible reads it together with its variables."""
    checkpoints_folder: str | None = None
    hf_home: str | None = None
    """Folders of the role hf_cache on the host, from its inventory or the last bootstrap; None if not known."""

    def with_folders(self, variables: Mapping[str, Any]) -> Host:
        """Return the host with the folders that variables of the role set; other values change nothing.

        A template that only names variables is resolved, such as `{{ mixtral_checkpoint_folder }}`.
        """
        found = {field: _resolved(variables, name) for field, name in FOLDER_VARIABLES.items()}
        known = {
            field: str(each) for field, each in found.items() if str(each).startswith("/") and not _is_template(each)
        }
        return dataclasses.replace(self, **known)  # type: ignore[arg-type]

    @property
    def inventory_name(self) -> str:
        """Name of the host in an inventory. Ansible would split `gpu-01:2222`."""
        return self.name if self.inventory else re.sub(r"[^A-Za-z0-9_.-]", "-", self.name)

    @property
    def target(self) -> str:
        """The host as the user would write it: `ubuntu@gpu-01:2222`."""
        user = f"{self.user}@" if self.user else ""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{user}{address}" + (f":{self.port}" if self.port else "")

    @property
    def bootstrap_arguments(self) -> str:
        """Arguments of `bootstrap` for this host in a message, with the inventory that holds its variables."""
        return shlex.join(["-i", self.inventory, "--limit", self.name]) if self.inventory else self.target

    @property
    def ssh_arguments(self) -> list[str]:
        """Arguments of ssh that select the host, with its user, port, key and further options."""
        found = list(self.ssh_options)
        if self.port:
            found += ["-p", str(self.port)]
        if self.user:
            found += ["-l", self.user]
        if self.identity_file:
            found += ["-i", self.identity_file]
        return [*found, "--", self.address]

    def ssh_command(self, *flags: str, command: str | None = None) -> str:
        """Return the command line that connects to the host as the kit does, for a message: it works when copied."""
        *selecting, end_of_options, address = self.ssh_arguments
        end = [end_of_options] if address.startswith("-") else []
        return shlex.join(["ssh", *flags, *selecting, *end, address, *([command] if command else [])])

    def ansible_variables(self) -> dict[str, Any]:
        """Return the connection variables of the host for an inventory that the kit writes."""
        found: dict[str, Any] = {"ansible_host": self.address}
        if self.user:
            found["ansible_user"] = self.user
        if self.port:
            found["ansible_port"] = self.port
        if self.identity_file:
            found["ansible_ssh_private_key_file"] = self.identity_file
        if self.ssh_options:
            found["ansible_ssh_common_args"] = shlex.join(self.ssh_options)
        return found


def parse_host(text: str) -> Host:
    """Parse `[user@]name[:port]`. An IPv6 address followed by a port is in brackets. Raises ConfigError."""
    user, _, rest = text.rpartition("@")
    address, port_text = rest, ""
    bracketed = re.fullmatch(r"\[([^]]*)\](?::(.*))?", rest)
    if bracketed:
        address, port_text = bracketed.group(1), bracketed.group(2) or ""
    elif rest.count(":") == 1:
        address, port_text = rest.split(":")
    found = None
    if "@" in text and not _USER.fullmatch(user):
        found = f"the user {user!r}"
    elif not _ADDRESS.fullmatch(address):
        found = f"the name {address!r}"
    elif (rest.count(":") == 1 or (bracketed and bracketed.group(2) is not None)) and not _is_port(port_text):
        found = f"the port {port_text!r}"
    if found:
        raise ConfigError(
            f"{text!r} does not name a host.",
            expected="[user@]name[:port], such as ubuntu@gpu-01 or ubuntu@gpu-02:2222",
            found=found,
        )
    port = int(port_text) if port_text else None
    name = f"{address}:{port}" if port else address
    return Host(name=name, address=address, user=user or None, port=port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 65536


def parse_hosts(texts: Iterable[str]) -> tuple[Host, ...]:
    """Parse hosts in the given order; duplicates count once. Raises ConfigError with all problems."""
    found: dict[str, Host] = {}
    problems: list[str] = []
    for text in texts:
        try:
            host = parse_host(text)
        except ConfigError as error:
            problems.append(f"{text!r}: {error.found}")
            continue
        earlier = found.setdefault(host.name, host)
        if earlier != host:
            problems.append(f"{host.name} is named twice: {earlier.target} and {host.target}")
    if problems:
        raise ConfigError(
            "Some hosts are not valid.",
            expected="[user@]name[:port], such as ubuntu@gpu-01 or ubuntu@gpu-02:2222",
            problems=problems,
        )
    return tuple(found.values())


CONNECTION_VARIABLES = (
    "ansible_host", "ansible_ssh_host", "ansible_port", "ansible_ssh_port", "ansible_user", "ansible_ssh_user",
    "ansible_ssh_private_key_file", "ansible_private_key_file", "ansible_ssh_common_args", "ansible_ssh_extra_args",
)  # fmt: skip
"""Inventory variables that define the connection to a host."""


def unresolved_variables(listing: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return, by host, the connection variables that hold a template or an encrypted value."""
    variables: Mapping[str, Any] = listing.get("_meta", {}).get("hostvars", {})
    found = {}
    for name in inventory_names(listing):
        values = variables.get(name, {})
        open_ones = tuple(key for key in CONNECTION_VARIABLES if key in values and not _is_value(values[key]))
        if open_ones:
            found[name] = open_ones
    return found


def _is_value(value: Any) -> bool:
    return value is None or (isinstance(value, (str, int)) and not _is_template(value))


def _resolved(variables: Mapping[str, Any], name: str) -> Any:
    """Return the value of a variable with those that its template names put in. What is left of a template stays."""
    value = variables.get(name)
    for _ in range(_MOST_TEMPLATES):
        if not isinstance(value, str) or not _is_template(value):
            break
        value = _NAME_IN_TEMPLATE.sub(lambda found: str(variables.get(found[1], found[0])), value)
    return value


def _is_template(value: Any) -> bool:
    return re.search(r"{{|{%", str(value)) is not None


def inventory_names(listing: Mapping[str, Any]) -> list[str]:
    """Return the host names of an inventory: those of the group mixtral_hosts if it exists, else all."""
    return _members(listing, GROUP) if GROUP in listing else _members(listing, "all")


def groups_of(listing: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the hosts of each group of an inventory, those of its child groups included.

    Ansible lists a group without hosts only among the children of another.
    """
    names = [*listing, *(child for group in listing.values() for child in group.get("children", []))]
    return {name: _members(listing, name) for name in dict.fromkeys(names) if name not in ("_meta", "all")}


def hosts_of_inventory(listing: Mapping[str, Any], inventory: Path) -> tuple[Host, ...]:
    """Return the hosts in the output of `ansible-inventory --list`, templates resolved.

    Raises ConfigError for an invalid port, or options of ssh with an open quotation mark.
    """
    variables: Mapping[str, Any] = listing.get("_meta", {}).get("hostvars", {})
    return tuple(_inventory_host(name, variables.get(name, {}), inventory) for name in inventory_names(listing))


def _members(listing: Mapping[str, Any], group: str) -> list[str]:
    """Return the hosts of a group in Ansible's order: its own, then those of its children, then of their children."""
    found: dict[str, None] = {}
    seen, level = {group}, [group]
    while level:
        children: dict[str, None] = {}
        for name in level:
            found |= dict.fromkeys(listing.get(name, {}).get("hosts", []))
            children |= dict.fromkeys(listing.get(name, {}).get("children", []))
        level = [name for name in children if name not in seen]
        seen.update(level)
    return list(found)


def _inventory_host(name: str, variables: Mapping[str, Any], inventory: Path) -> Host:
    def first(*keys: str) -> Any:
        return next((variables[key] for key in keys if variables.get(key)), None)

    port = first("ansible_port", "ansible_ssh_port")
    user = first("ansible_user", "ansible_ssh_user")
    key = first("ansible_ssh_private_key_file", "ansible_private_key_file")
    if port and not _is_port(str(port)):
        raise ConfigError(
            f"{name} has an invalid port.",
            where=str(inventory),
            expected="ansible_port from 1 to 65535",
            found=repr(port),
        )
    options = " ".join(str(variables.get(key) or "") for key in ("ansible_ssh_common_args", "ansible_ssh_extra_args"))
    try:
        ssh_options = tuple(shlex.split(options))
    except ValueError as error:
        raise ConfigError(
            f"{name}: its options of ssh cannot be split into words.",
            where=str(inventory),
            expected="ansible_ssh_common_args and ansible_ssh_extra_args as a shell reads them",
            found=f"{options!r}: {error}",
        ) from error
    return Host(
        name=name,
        address=str(first("ansible_host", "ansible_ssh_host") or name),
        user=str(user) if user else None,
        port=int(port) if port else None,
        identity_file=str(expanded(str(key))) if key else None,
        ssh_options=ssh_options,
        inventory=str(expanded(inventory).resolve()),
    ).with_folders(variables)


def names_of(hosts: Iterable[Host]) -> str:
    """Return the names of hosts for a message, shortened if there are many."""
    return shortened([host.name for host in hosts])


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Return the first `most` names and the number of further ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def remembered_hosts() -> tuple[Host, ...]:
    """Return the fleet: all hosts that were bootstrapped from this machine."""
    rows = read_json(_fleet_file(), [])
    known = {item.name for item in dataclasses.fields(Host)}
    found = []
    for row in rows if isinstance(rows, list) else []:
        values = {key: value for key, value in row.items() if key in known}
        values["ssh_options"] = tuple(values.get("ssh_options", ()))
        found.append(Host(**values))
    return tuple(found)


def remember_hosts(hosts: Iterable[Host]) -> None:
    """Add hosts to the fleet. A host of the same name is replaced, apart from folders that the new entry lacks."""
    found = {host.name: host for host in remembered_hosts()}
    for host in hosts:
        earlier = found.get(host.name, host)
        found[host.name] = dataclasses.replace(
            host,
            checkpoints_folder=host.checkpoints_folder or earlier.checkpoints_folder,
            hf_home=host.hf_home or earlier.hf_home,
        )
    write_json(_fleet_file(), [dataclasses.asdict(host) for host in found.values()])


def with_recorded_folders(hosts: Iterable[Host]) -> tuple[Host, ...]:
    """Return hosts of an inventory with the folders of their last bootstrap, where the inventory names none."""
    recorded = {(host.name, host.inventory): host for host in remembered_hosts()}
    found = []
    for host in hosts:
        last = recorded.get((host.name, host.inventory), host)
        checkpoints_folder = host.checkpoints_folder or last.checkpoints_folder
        found.append(
            dataclasses.replace(host, checkpoints_folder=checkpoints_folder, hf_home=host.hf_home or last.hf_home)
        )
    return tuple(found)


def inventory_entry_of(host: Host, known: Iterable[Host]) -> Host | None:
    """Return the remembered entry, from an inventory that still exists, of a host that is now named without inventory.

    The host is the same if its name or its address and port are equal, even with another user.
    """
    for other in known:
        same = host.name == other.name or (host.address, host.port) == (other.address, other.port)
        if same and host.inventory is None and other.inventory and Path(other.inventory).exists():
            return other
    return None


def forget_hosts(hosts: Iterable[Host]) -> None:
    """Remove hosts from the fleet."""
    gone = {host.name for host in hosts}
    write_json(_fleet_file(), [dataclasses.asdict(host) for host in remembered_hosts() if host.name not in gone])


def _fleet_file() -> Path:
    return state_folder() / "hosts.json"


def find_hosts(words: Sequence[str], known: Sequence[Host] = ()) -> tuple[Host, ...]:
    """Return the hosts of `--on gpu-01,ops@gpu-02`: known hosts by name or address, others as they are written."""
    pieces = [piece for word in words for piece in word.split(",") if piece]
    named = {piece: known_as(piece, known) for piece in pieces}
    parse_hosts(piece for piece, host in named.items() if host is None)  # reports all problems at once
    return tuple(dict.fromkeys(named[piece] or parse_host(piece) for piece in pieces))


def known_as(piece: str, known: Sequence[Host]) -> Host | None:
    """Return the host of this name or address. Raises ConfigError if several hosts have the address."""
    named = [host for host in known if piece in (host.name, host.target)]
    addressed = [host for host in known if host.address == piece]
    if len(addressed) > 1 and not named:
        raise ConfigError(f"{piece!r} names several hosts.", expected="one of them", found=names_of(addressed))
    return named[0] if named else addressed[0] if addressed else None

"""Teardown of hosts: list what goes and what stays, ask, then run the roles with `state: absent`."""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mixtral_run.config.fields import SETTINGS_ERROR
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.bootstrap.bootstrap import DEFAULT_FORKS, KEEP_CONNECTION, show_play
from mixtral_run.fleet.bootstrap.host_lock import Held, hold_locks
from mixtral_run.fleet.bootstrap.progress import FleetProgress, HostProgress, Notice, Phase
from mixtral_run.fleet.bootstrap.view import summary
from mixtral_run.fleet.explain.explain import recognize, record_failures
from mixtral_run.fleet.hosts import Host, forget_hosts, shortened
from mixtral_run.fleet.jobs.jobs import list_jobs
from mixtral_run.fleet.plays.provisioning import playbook, role_names
from mixtral_run.fleet.plays.role_variables import refuse_misspelled
from mixtral_run.fleet.plays.runner import Play, RunningPlay, forget_old_plays, parse_extra_vars
from mixtral_run.fleet.selection import hosts_of, inventory_of, refuse_lost_variables
from mixtral_run.fleet.ssh.connection import Ssh, connection_options
from mixtral_run.fleet.state import state_folder

STAYS = (
    "checkpoints, adapters, and models in the HF cache",
    "containers, volumes, and images that the kit did not bring",
    "an NVIDIA driver and a fabric manager that the kit did not install",
    "the log of who changed the host, /var/log/mixtral-run/history.jsonl",
    "Python, and source files of others that name Docker's or NVIDIA's repository: they stay disabled",
)
"""What `state: absent` of the roles leaves on a host."""


LEFT_ON_HOSTS = (
    ("models, checkpoints and adapters, unless variables named other folders", "sudo rm -r /var/lib/mixtral-run"),
    (
        "images, containers and volumes that nothing uses, of an engine that is there",
        "docker system prune --all --volumes",
    ),
    ("all images, containers and volumes, where no engine is left", "sudo rm -r /var/lib/docker /var/lib/containerd"),
    ("records of jobs in the home of the user who started them", "rm -r ~/.local/state/mixtral-run"),
    ("compiled kernels in the same home", "rm -r ~/.cache/mixtral-run"),
    ("the log of who changed the host", "sudo rm -r /var/log/mixtral-run"),
)
"""What a teardown leaves on a host, and the command there that removes it for good."""


def left_here() -> tuple[tuple[str, str], ...]:
    """Return what the kit keeps on this computer, and the command that removes it."""
    folder = shlex.quote(str(state_folder()))
    known = "known host keys, logs of plays, failures, and records of jobs of all hosts: also of those still in use"
    return ((known, f"rm -r {folder}"),)


@dataclass(frozen=True, kw_only=True)
class TeardownRequest:
    """Settings of a teardown."""

    hosts: tuple[str, ...] = ()
    inventory: Path | None = None
    limit: str | None = None
    tags: tuple[str, ...] = ()
    extra_vars: tuple[str, ...] = ()
    forks: int | None = None
    """None: as bootstrap."""
    check: bool = False
    diff: bool = False
    become_password: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Removal:
    """A change that takes something back: the task, and what the module reports that it removes and puts back."""

    task: str
    removed: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What does not come back as it was."""


class TeardownProgress(FleetProgress):
    """Progress of a teardown that also records what each changed task removes."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(names)
        self.removals: dict[str, list[Removal]] = {host.name: [] for host in self.hosts.values()}

    def _result(self, host: HostProgress, kind: str, data: Mapping[str, Any], event: Mapping[str, Any]) -> list[Notice]:
        notices = super()._result(host, kind, data, event)
        result = data.get("res")
        if kind == "runner_on_ok" and isinstance(result, Mapping) and result.get("changed"):
            removed, restored, notes = (_texts(result.get(key)) for key in ("removed", "restored", "notes"))
            self.removals[host.name].append(Removal(host.changed_tasks[-1], removed, restored, notes))
        return notices


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(each) for each in value) if isinstance(value, list) else ()


@dataclass(frozen=True)
class TeardownEnd:
    """Result of a teardown. `text` is the summary for the terminal."""

    progress: TeardownProgress
    interrupted: bool
    text: str
    check: bool = False

    def to_json(self) -> str:
        """Return result, removals and failure of each host as JSON."""
        hosts = [
            {
                "name": host.name,
                "result": host.phase.value,
                "removed": [
                    {
                        "task": each.task,
                        "removed": list(each.removed),
                        "restored": list(each.restored),
                        "notes": list(each.notes),
                    }
                    for each in self.progress.removals[host.name]
                ],
                "failure": host.failure.message if host.failure else None,
            }
            for host in self.progress.hosts.values()
        ]
        left = {
            place: [{"what": what, "remove": command} for what, command in found]
            for place, found in (("hosts", LEFT_ON_HOSTS), ("here", left_here()))
        }
        told = {"check": self.check, "hosts": hosts, "stays": list(STAYS), "left": left}
        return json.dumps(told, indent=2, ensure_ascii=False)

    def raise_if_bad(self) -> None:
        """Raise HostError if the kit was not taken back from a host, KeyboardInterrupt if the user interrupted."""
        if self.interrupted:
            raise KeyboardInterrupt
        bad = [host.name for host in self.progress.bad]
        if bad:
            raise HostError(f"The kit could not be taken back from {shortened(bad)}; the messages show what to do.")


def teardown(
    request: TeardownRequest,
    confirm: Callable[[str], bool],
    stream: TextIO | None = None,
    starter: Callable[[Play], RunningPlay] = RunningPlay,
) -> TeardownEnd | None:
    """Take the kit back from hosts. Return None if `confirm`, which gets the list of what goes and stays, says no.

    Raises ConfigError for invalid settings; HostError, before anything is changed, if a host runs jobs, cannot be
    reached, or refuses a change in check mode.
    """
    stream = stream or sys.stdout
    hosts, inventory = _hosts(request)
    ssh = Ssh()
    _refuse_unreachable(ssh, hosts)
    _refuse_running_jobs(ssh, hosts)
    print(f"Looking at what the kit has on {shortened([host.name for host in hosts])} …", file=stream, flush=True)
    seen = _play(request, inventory, hosts, ssh, True, stream, starter)
    if seen.interrupted or seen.progress.bad or request.check:
        return seen
    print(listing(seen.progress.removals), file=stream, flush=True)
    if not any(seen.progress.removals.values()):
        return seen
    if not confirm(f"Take all of this back from {shortened([host.name for host in hosts])}?"):
        return None
    with hold_locks(ssh, hosts, "mixtral-run teardown") as locks:
        if len(locks.problems) == len(hosts):
            raise HostError("Nothing was changed.", problems=[str(each) for each in locks.problems.values()])
        for host, text in locks.notes.items():
            print(f"{host.name}: {text}", file=stream, flush=True)
        end = _play(request, inventory, hosts, ssh, False, stream, starter, locks)
    done = {name for name, host in end.progress.hosts.items() if host.phase is Phase.DONE}
    if not request.tags:
        forget_hosts(host for host in hosts if host.inventory_name in done)
    return end


def listing(removals: Mapping[str, Sequence[Removal]]) -> str:
    """Return the text that lists what goes and what stays. Hosts from which the same goes are listed together."""
    alike: dict[tuple[Removal, ...], list[str]] = {}
    for name, found in removals.items():
        alike.setdefault(tuple(found), []).append(name)
    lines = []
    for changes, names in alike.items():
        if not changes:
            lines.append(f"{shortened(names)}: nothing of the kit is there.")
            continue
        lines.append(f"{shortened(names)}: this goes")
        lines += [f"  - {each.task}{_named(each.removed)}" for each in changes]
        back = [name for each in changes for name in each.restored]
        if back:
            lines += [f"{shortened(names)}: this comes back, which the kit had replaced", f"  - {', '.join(back)}"]
        lines += [f"  - {note}" for each in changes for note in each.notes]
    return "\n".join([*lines, "This stays", *(f"  - {each}" for each in STAYS)])


def left_over() -> str:
    """Return the text that tells what is left after a teardown, and how to remove it."""
    lines = ["Left on the hosts, and the command there that removes it:"]
    lines += [f"  - {what}: {command}" for what, command in LEFT_ON_HOSTS]
    lines += ["Left on this computer:", *(f"  - {what}: {command}" for what, command in left_here())]
    return "\n".join(lines)


def _named(removed: Iterable[str]) -> str:
    words = ", ".join(removed)
    return f": {words}" if words else ""


def _hosts(request: TeardownRequest) -> tuple[tuple[Host, ...], Path | None]:
    """Return the hosts and their inventory. Unlike other verbs, teardown never takes the whole fleet for no name."""
    parse_extra_vars(request.extra_vars)
    known = tuple(name for name in role_names() if name != "preflight")
    unknown = [tag for tag in request.tags if tag not in known]
    problems = [f"--tags: expected some of {', '.join(known)}; found {', '.join(unknown)}"] if unknown else []
    if not request.hosts and request.inventory is None:
        problems.append("no host is named: give HOST …, or -i INVENTORY")
    if problems:
        raise ConfigError(SETTINGS_ERROR, problems=problems)
    hosts = hosts_of(request.hosts, request.inventory, request.limit)
    if request.inventory is None:
        refuse_lost_variables(hosts)
    inventory = request.inventory or inventory_of(hosts)
    if inventory is None:
        refuse_misspelled(request.extra_vars)
    return hosts, inventory


def _refuse_unreachable(ssh: Ssh, hosts: Sequence[Host]) -> None:
    def problem(host: Host) -> str | None:
        try:
            ssh.check(host, ["true"], timeout_seconds=45)
        except HostError as error:
            return str(error)
        return None

    problems = [found for found in ssh.each(list(hosts), problem) if found]
    if problems:
        raise HostError("Hosts cannot be reached; nothing was changed.", problems=problems)


def _refuse_running_jobs(ssh: Ssh, hosts: Sequence[Host]) -> None:
    """Raise HostError if a host runs jobs, or does not say whether it does. A host without an engine runs none."""
    rows, errors = list_jobs(hosts, ssh)
    problems = [f"{row.host.name}: {row.job} ({row.verb}) is {row.state}" for row in rows if row.running]
    for error in errors:
        known = recognize(error.found or str(error))
        if known is None or known.name != "engine-down":
            problems.append(str(error))
    if problems:
        raise HostError(
            "A host with jobs is not torn down; nothing was changed.",
            problems=problems,
            next_command="mixtral-run stop JOB, or wait: mixtral-run logs -f JOB",
        )


def _play(
    request: TeardownRequest,
    inventory: Path | None,
    hosts: tuple[Host, ...],
    ssh: Ssh,
    check: bool,
    stream: TextIO,
    starter: Callable[[Play], RunningPlay],
    locks: Held | None = None,
) -> TeardownEnd:
    """Run the playbook and show it. locks: of the hosts; one that another operator holds is not touched."""
    locks = locks or Held()
    began = time.monotonic()
    progress = TeardownProgress({host.inventory_name: host.name for host in hosts})
    notices = [progress.unreachable(host.inventory_name, str(why)) for host, why in locks.problems.items()]
    hosts = tuple(host for host in hosts if host not in locks.problems)
    play = Play(
        playbook=playbook("teardown"),
        hosts=hosts,
        inventory=inventory,
        variables=locks.variables,
        extra_vars=request.extra_vars,
        tags=request.tags,
        check=check,
        diff=request.diff,
        forks=min(request.forks or DEFAULT_FORKS, len(hosts)),
        ssh_args=(*KEEP_CONNECTION, *connection_options(ssh.known_hosts)),
        become_password=request.become_password,
    )
    # In check mode the list says it all, except for differences of files.
    shown = stream if request.diff or not check else io.StringIO()
    end, interrupted = show_play(starter(play), progress, shown, request.diff, notices)
    for host, why in locks.lost.items():
        progress.lost_lock(host.inventory_name, str(why))
    forget_old_plays()
    record_failures({host.name: host.failure.message for host in progress.bad if host.failure})
    log = end.artifacts / "stdout"
    seconds = time.monotonic() - began
    text = summary(progress, seconds=seconds, log=log, retry=None, check=check)
    if interrupted:
        text += "\nStopped. The same command continues from there."
    elif not check and not request.tags:
        text += f"\n{left_over()}"
    return TeardownEnd(progress, interrupted, text, check)

"""State of every host, computed from ansible-runner's events. Pure: no clock, no terminal; events carry the times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from mixtral_run.fleet.untrusted import printable_values


class Phase(Enum):
    """State of a host. The last four are final."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    STOPPED = "stopped"

    @property
    def is_end(self) -> bool:
        return self not in (Phase.WAITING, Phase.RUNNING)


@dataclass(frozen=True)
class Failure:
    """A failed task of a host."""

    role: str
    task: str
    message: str


@dataclass
class HostProgress:
    """Progress of a host."""

    name: str
    phase: Phase = Phase.WAITING
    role: str = ""
    task: str = ""
    detail: str = ""
    """Detail of the current task, such as the host that a copy comes from."""
    task_since: float | None = None
    """Seconds since the epoch."""
    ok: int = 0
    changed: int = 0
    skipped: int = 0
    failures: list[Failure] = field(default_factory=list)
    """Failed tasks in order. Failures that a rescue block handled are removed when the play ends."""
    warnings: list[str] = field(default_factory=list)
    changed_tasks: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    """Changes that nobody should miss, such as those of users and owners: `role · task: change, …`."""
    hidden_tasks: list[str] = field(default_factory=list)
    """Tasks with hidden results (no_log): only the count at the end tells whether they changed something."""

    @property
    def failure(self) -> Failure | None:
        """The first failure."""
        return self.failures[0] if self.failures else None


@dataclass(frozen=True)
class Notice:
    """An event that a plain log prints immediately: a change, a failure, a difference."""

    host: str
    kind: str
    """changed, failed, unreachable, diff, warning, announcement or note."""
    text: str


class FleetProgress:
    """State of a fleet. `fold` applies an event to it."""

    def __init__(self, names: Iterable[str] | Mapping[str, str]) -> None:
        """Create the state of waiting hosts.

        Args:
            names: inventory names; or a mapping from inventory names to the names for output.
        """
        shown = names if isinstance(names, Mapping) else {name: name for name in names}
        self.hosts = {name: HostProgress(title) for name, title in shown.items()}
        self.started: float | None = None
        self.finished = False
        self.play_error: str | None = None
        """Ansible's message if it could not start, for example because of an error in a variables file."""

    def fold(self, event: Mapping[str, Any]) -> list[Notice]:
        """Apply one event, whose texts come from hosts, and return the notices that a plain log prints for it."""
        event = printable_values(event)
        kind = str(event.get("event", ""))
        data: Mapping[str, Any] = event.get("event_data") or {}
        if self.started is None:
            self.started = event_time(event)
        if kind == "playbook_on_stats":
            return self._end(data)
        if kind == "error" or (kind == "verbose" and str(event.get("stdout", "")).startswith(("ERROR!", "[ERROR]"))):
            text = str(event.get("stdout", "")).strip()
            self.play_error = f"{self.play_error}\n{text}" if self.play_error else text
            return []
        host = self.hosts.get(str(data.get("host", "")))
        if host is None:
            return []
        if kind == "runner_on_start":
            host.phase = Phase.RUNNING
            role = str(data.get("role") or "")
            host.detail = host.detail if role == host.role else ""
            host.role, host.task = role, str(data.get("task") or "")
            host.task_since = event_time(event)
            return []
        return self._result(host, kind, data, event)

    def stop(self) -> None:
        """Mark all hosts that have not ended as stopped, after the play was cancelled."""
        for host in self.hosts.values():
            if not host.phase.is_end:
                host.phase = Phase.STOPPED

    def unreachable(self, name: str, message: str) -> Notice:
        """Mark a host as unreachable before the play and return the notice for it."""
        host = self.hosts[name]
        host.phase, host.failures = Phase.UNREACHABLE, [Failure("", "connect", message)]
        return Notice(host.name, "unreachable", message)

    def lost_lock(self, name: str, message: str) -> None:
        """Mark a host that another operator changed at the same time as failed, however its play ended."""
        host = self.hosts[name]
        host.phase = Phase.FAILED
        host.failures.append(Failure("", "lock of the host", message))

    def _result(self, host: HostProgress, kind: str, data: Mapping[str, Any], event: Mapping[str, Any]) -> list[Notice]:
        result = data.get("res") if isinstance(data.get("res"), Mapping) else {}
        assert isinstance(result, Mapping)
        role, task = str(data.get("role") or ""), str(data.get("task") or "")
        label = _label(role, task)
        notices = []
        for each in _list(result.get("warnings")):
            # Some modules begin with the host's name. Without it the warnings of all hosts are equal, and shown once.
            warning = str(each).removeprefix(f"{host.name}: ")
            if warning not in host.warnings:
                host.warnings.append(warning)
                notices.append(Notice(host.name, "warning", warning))
        notices += [Notice(host.name, "announcement", str(each)) for each in _list(result.get("announcements"))]
        if "spread_note" in result:
            host.detail = str(result.get("msg") or result["spread_note"])
            notices += [Notice(host.name, "note", str(result["spread_note"]))] if result["spread_note"] else []
        if kind == "runner_on_unreachable" and f"[{data.get('host')} -> " in str(event.get("stdout", "")):
            # The task is delegated: not this host is lost, but one that it copies from, which another replaces.
            host.ok += 1
            notices.append(Notice(host.name, "warning", f"{label}: {failure_message(result)}"))
            return notices
        if kind == "runner_on_ok":
            host.ok += 1
        if kind == "runner_on_ok" and result.get("changed"):
            host.changed += 1
            host.changed_tasks.append(label)
            words = ", ".join(map(str, _list(result.get("shown"))))
            host.shown += [f"{label}: {words}"] if words else []
            notices.append(Notice(host.name, "changed", f"{label}: {words}" if words else label))
        elif kind == "runner_on_ok" and result.get("censored"):
            host.hidden_tasks.append(label)
        if kind == "runner_on_skipped":
            host.skipped += 1
        elif kind == "runner_on_failed":
            if data.get("ignore_errors"):
                host.ok += 1
                return notices
            message = failure_message(result)
            repeated = any(_is_deferred(failure, message) for failure in host.failures)
            host.failures.append(Failure(role, task, message))
            host.phase = Phase.FAILED
            if repeated:
                return notices
            notices.append(Notice(host.name, "failed", f"{label}: {message}"))
        elif kind == "runner_on_unreachable":
            message = failure_message(result)
            host.failures.append(Failure(role, task, message))
            host.phase = Phase.UNREACHABLE
            notices.append(Notice(host.name, "unreachable", message))
        elif kind in ("runner_on_file_diff", "runner_item_on_file_diff"):
            text = str(event.get("stdout", "")).strip("\r\n")
            if text:
                notices.append(Notice(host.name, "diff", f"{label}\n{text}"))
        return notices

    def _end(self, data: Mapping[str, Any]) -> list[Notice]:
        self.finished = True
        failures, dark = data.get("failures") or {}, data.get("dark") or {}
        rescued, seen = data.get("rescued") or {}, data.get("processed") or {}
        for name, host in self.hosts.items():
            if host.phase is Phase.UNREACHABLE or name in dark:
                host.phase = Phase.UNREACHABLE
                continue
            # A rescue block handles the failure before it. Only the count at the end of the play shows it.
            host.failures = _unrescued(host.failures, int(rescued.get(name, 0)))
            hidden = int((data.get("changed") or {}).get(name, 0)) - host.changed
            if hidden > 0 and host.hidden_tasks:
                host.changed += hidden
                host.changed_tasks += host.hidden_tasks
            host.phase = Phase.FAILED if failures.get(name) else Phase.DONE if name in seen else Phase.WAITING
        return []

    @property
    def bad(self) -> list[HostProgress]:
        """Hosts that were not set up completely."""
        return [host for host in self.hosts.values() if host.phase is not Phase.DONE]


def _list(value: object) -> list[Any]:
    """Return a list of a module's result. The host is not trusted to send one."""
    return value if isinstance(value, list) else []


def _label(role: str, task: str) -> str:
    return " · ".join(part for part in (role, task) if part)


def _unrescued(failures: list[Failure], num_rescued: int) -> list[Failure]:
    """Return the failures that no rescue block handled.

    A play that defers a failure reports it again at its end: that failure is the only one then.
    """
    deferred = [failure for failure in failures[:-1] if _is_deferred(failure, failures[-1].message)]
    return deferred[:1] or failures[num_rescued:]


def _is_deferred(failure: Failure, message: str) -> bool:
    """Return True if a message at the end of a play repeats this failure: `TASK: message`."""
    return failure.message[:200] in message or bool(failure.task and message.startswith(f"{failure.task}: "))


_NO_RESULT = "Module result deserialization failed"
"""Beginning of Ansible's message if what the host printed is not the result of a module."""

_PRINTING_LOGIN = """The host printed something of its own into the result of a task.
  expected: nothing is printed at a login that runs a command
  found:    {found}
  next:     let the start-up files of the login (~/.bashrc, ~/.profile, /etc/profile.d, ~/.ssh/rc) print only in
            interactive shells: put `case $- in *i*) ;; *) return ;; esac` before what prints"""


def failure_message(result: Mapping[str, Any]) -> str:
    """Return the message of a failed task. For a loop, it is the message of the first failed item."""
    if result.get("censored"):
        return "the task failed; its output is hidden because it handles a secret"
    for item in result.get("results") or []:
        if isinstance(item, Mapping) and item.get("failed"):
            return failure_message(item)
    message = str(result.get("msg") or "").strip()
    generic = message in ("", "non-zero return code") or message.startswith(("MODULE FAILURE", _NO_RESULT))
    details = [str(result.get(key) or "").strip() for key in ("stderr", "module_stderr", "stdout", "module_stdout")]
    printed = str(result.get("module_stdout") or "")
    # Every result of a module holds its arguments: it is there, and something else was printed before it.
    if message.startswith(_NO_RESULT) and '"invocation"' in printed:
        return _PRINTING_LOGIN.format(found=printed.strip().splitlines()[0][:200])
    if generic:
        message = next((detail for detail in details if detail), message) or "it failed without a message"
    return message


def event_time(event: Mapping[str, Any]) -> float | None:
    """Return the time of an event in seconds since the epoch, or None if the event has none."""
    try:
        return datetime.fromisoformat(str(event["created"])).timestamp()
    except (KeyError, ValueError):
        return None

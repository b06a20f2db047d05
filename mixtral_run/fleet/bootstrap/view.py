"""Display of a play: a live table with one line per host on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import textwrap
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from mixtral_run.fleet.bootstrap.progress import FleetProgress, HostProgress, Notice, Phase
from mixtral_run.fleet.explain.explain import recognize
from mixtral_run.fleet.hosts import shortened

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

MARKS = {
    Phase.WAITING: "·",
    Phase.RUNNING: "…",
    Phase.DONE: "✓",
    Phase.FAILED: "✗",
    Phase.UNREACHABLE: "✗",
    Phase.STOPPED: "!",
}
_COLORS = {Phase.DONE: "green", Phase.FAILED: "red", Phase.UNREACHABLE: "red", Phase.STOPPED: "yellow"}
# Order of the hosts if not all fit on the screen: those that need attention come first.
_ORDER = (Phase.FAILED, Phase.UNREACHABLE, Phase.STOPPED, Phase.RUNNING, Phase.WAITING, Phase.DONE)
QUIET_SECONDS = 30.0
"""After this time without output, plain lines report the running tasks."""


class PlayView(AbstractContextManager["PlayView"]):
    """Display of a running play. Call `update` after each event and regularly in between."""

    def __init__(self, progress: FleetProgress, stream: TextIO, diff: bool = False) -> None:
        self.progress, self.stream, self.diff = progress, stream, diff

    @abstractmethod
    def update(self, notices: Iterable[Notice] = ()) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainView(PlayView):
    """Plain display: one line per change and failure."""

    def __init__(self, progress: FleetProgress, stream: TextIO, diff: bool = False) -> None:
        super().__init__(progress, stream, diff)
        self._last = time.monotonic()
        self._ended: set[str] = set()

    def update(self, notices: Iterable[Notice] = ()) -> None:
        lines = [line for notice in notices for line in self._lines(notice)]
        # A host is done when the play ends. Before that, a look at every host at each event grows with their square.
        for host in self.progress.hosts.values() if self.progress.finished else ():
            if host.phase is Phase.DONE and host.name not in self._ended:
                self._ended.add(host.name)
                lines.append(f"{MARKS[Phase.DONE]} {host.name}: done, {counts(host)}")
        if not lines and time.monotonic() - self._last > QUIET_SECONDS:
            running = [host for host in self.progress.hosts.values() if host.phase is Phase.RUNNING]
            lines = [f"… {host.name}: {where(host)} ({elapsed(host)})" for host in running]
        if lines:
            self._last = time.monotonic()
            print("\n".join(lines), file=self.stream, flush=True)

    def _lines(self, notice: Notice) -> list[str]:
        if notice.kind == "diff":
            return [f"± {notice.host}: {notice.text}"] if self.diff else []
        if notice.kind == "note":
            return [f"← {notice.host}: {notice.text}"]
        if notice.kind == "announcement":
            return []  # a warning of the same task has said it
        mark = {"changed": "~", "warning": "!"}.get(notice.kind, "✗")
        return [f"{mark} {notice.host}: {notice.kind} · {first_line(notice.text)}"]


class LiveView(PlayView):
    """Live display: one line per host, redrawn in place. Requested differences scroll above the table.

    Warnings appear only in the summary: fifty hosts can give the same warning fifty times. What a role is about to
    replace on a host is printed above the table before it happens.
    """

    def __init__(self, progress: FleetProgress, stream: TextIO, diff: bool = False) -> None:
        super().__init__(progress, stream, diff)
        from rich.console import Console
        from rich.live import Live

        self.console: Console = Console(file=stream, highlight=False, markup=False)
        self._live: Live = Live(
            console=self.console,
            get_renderable=self._table,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, notices: Iterable[Notice] = ()) -> None:
        for notice in notices:
            if notice.kind == "diff" and self.diff:
                self.console.print(f"± {notice.host}: {notice.text}")
            elif notice.kind == "announcement":
                self.console.print(f"! {notice.host}: {notice.text}")

    def _table(self) -> Table:
        return progress_table(self.progress, self.console.size.height - 2)


def progress_table(progress: FleetProgress, height: int) -> Table:
    """Return the live table, cut to `height` lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("host", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("task", no_wrap=True, ratio=1, overflow="ellipsis")
    table.add_column("elapsed", justify="right", no_wrap=True)
    table.add_column("changed/ok", justify="right", no_wrap=True)
    hosts = list(progress.hosts.values())
    num_lines = max(height - 1, 3)
    shown = hosts
    if len(hosts) > num_lines:
        shown = sorted(hosts, key=lambda host: _ORDER.index(host.phase))[: num_lines - 1]
    for host in shown:
        style = _COLORS.get(host.phase, "")
        task = host.failure.task if host.failure else host.task if host.phase is Phase.RUNNING else host.phase.value
        if host.failure:
            task += ": " + first_line(host.failure.message)
        elif host.phase is Phase.RUNNING and host.detail:
            task += ": " + host.detail
        running = host.phase is Phase.RUNNING
        table.add_row(
            Text(f"{MARKS[host.phase]} {host.name}", style=style),
            host.role,
            Text(task, style=style),
            elapsed(host) if running else "",
            f"{host.changed}/{host.ok}",
        )
    if len(hosts) > len(shown):
        table.caption = f"  and {len(hosts) - len(shown)} more: {phase_counts(progress.hosts.values())} in all"
        table.caption_justify = "left"
    return table


def make_view(progress: FleetProgress, stream: TextIO, diff: bool = False) -> PlayView:
    """Return the live display for a terminal, the plain display for any other stream."""
    return LiveView(progress, stream, diff) if stream.isatty() else PlainView(progress, stream, diff)


def where(host: HostProgress) -> str:
    """Return `role · task` of the host's current task, and what it is at."""
    return " · ".join(part for part in (host.role, host.task, host.detail) if part) or "connecting"


def counts(host: HostProgress) -> str:
    """Return `3 changed, 40 ok`."""
    return f"{host.changed} changed, {host.ok} ok"


def phase_counts(hosts: Iterable[HostProgress]) -> str:
    """Return the number of hosts in each phase: `3 done, 1 failed`."""
    phases = [host.phase for host in hosts]
    return ", ".join(f"{phases.count(phase)} {phase.value}" for phase in reversed(_ORDER) if phase in phases)


def elapsed(host: HostProgress, now: float | None = None) -> str:
    """Return the run time of the host's task as `4 s` or `3:20`."""
    if host.task_since is None:
        return ""
    return duration((now or time.time()) - host.task_since)


def duration(seconds: float) -> str:
    """Return a duration as `4 s`, `3:20` or `1:03:20`."""
    seconds = max(0, int(seconds))
    if seconds < 60:
        return f"{seconds} s"
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def first_line(text: str) -> str:
    """Return the first line of a text."""
    return text.strip().splitlines()[0] if text.strip() else ""


def summary(
    progress: FleetProgress, *, seconds: float, log: Path | None, retry: str | None, check: bool, width: int = 110
) -> str:
    """Return the summary of a play: a table, the first error of each failed host with its remedy, log and retry."""
    lines = ["", *_result_table(list(progress.hosts.values()), check)]
    for host in progress.bad:
        if host.phase is not Phase.WAITING:
            lines += ["", *_error_lines(host, width)]
    waiting = [host.name for host in progress.bad if host.phase is Phase.WAITING]
    if waiting:
        lines += ["", f"{MARKS[Phase.WAITING]} not started: {', '.join(waiting)}"]
    hosts = list(progress.hosts.values())
    lines += _alike("~", {host.name: host.shown for host in hosts})
    lines += _alike("!", {host.name: host.warnings for host in hosts})
    lines += ["", f"{phase_counts(progress.hosts.values())} in {duration(seconds)}"]
    if log is not None:
        lines.append(f"log:   {log}")
    if retry:
        lines.append(f"retry: {retry}")
    return "\n".join(lines)


def _alike(mark: str, texts: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each text, with all hosts that have it, after an empty line; nothing without a text."""
    names: dict[str, list[str]] = {}
    for name, found in texts.items():
        for text in found:
            names.setdefault(text, []).append(name)
    return ["", *(f"{mark} {shortened(alike)}: {text}" for text, alike in names.items())] if names else []


def _result_table(hosts: Sequence[HostProgress], check: bool) -> list[str]:
    changed = "would change" if check else "changed"
    header = ("host", "result", changed, "ok", "where")
    rows = [
        (
            f"{MARKS[host.phase]} {host.name}",
            host.phase.value,
            str(host.changed),
            str(host.ok),
            "" if host.phase is Phase.DONE else _place(host),
        )
        for host in hosts
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    marked = [(f"  {header[0]}", *header[1:]), *rows]
    widths[0] = max(widths[0], len(marked[0][0]))
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in marked]


def _place(host: HostProgress) -> str:
    if host.failure and host.phase is not Phase.STOPPED:
        return " · ".join(part for part in (host.failure.role, host.failure.task) if part)
    return where(host) if host.phase is Phase.STOPPED and host.task else ""


def _error_lines(host: HostProgress, width: int) -> list[str]:
    if host.phase is Phase.STOPPED:
        return [f"{MARKS[host.phase]} {host.name}: stopped at {where(host)}"]
    if host.failure is None:
        return [f"{MARKS[host.phase]} {host.name}: ended at {where(host)} without a message"]
    place = _place(host)
    lines = [f"✗ {host.name}: {place}"]
    for line in host.failure.message.strip().splitlines()[:30]:
        # A command stays on one line, so that it can be copied.
        longest = width if "next:" not in line else len(line) + 4
        lines += textwrap.wrap(line, longest, initial_indent="    ", subsequent_indent="      ", break_long_words=False)
    if "next:" in host.failure.message:
        return lines
    known = recognize(host.failure.message)
    if known is None:
        return [*lines, "    next:  see the log"]
    lines += textwrap.wrap(f"cause: {known.cause}", width, initial_indent="    ", subsequent_indent="           ")
    lines += [f"    next:  {command}" for command in known.commands_for(host.name)]
    return lines

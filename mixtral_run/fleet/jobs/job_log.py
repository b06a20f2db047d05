"""Live output of a job from all its hosts, until the job ends or the user leaves. Leaving does not stop the job."""

from __future__ import annotations

import collections
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from mixtral_run.errors import EXIT_CODES, HostError, MixtralRunError, Stopped, TrainingError
from mixtral_run.fleet.explain.explain import recognize, record_failures
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.jobs import ENGINE_SCRIPT, SIGNALLED, JobRow, RunningJob, engine, list_jobs
from mixtral_run.fleet.jobs.lost_hosts import HostLost, watch_hosts
from mixtral_run.fleet.ssh.connection import Ssh

RECONNECT_SECONDS = 2.0
PATIENCE_SECONDS = 600
"""Time without an answer after which a host counts as lost. Its part of the job may continue."""
KEPT_LINES = 400
OVERLAP_LINES = 50
"""Lines that are requested again after a lost connection. The engine records the two outputs of a container in
parallel, so the log is not strictly in the order of its time stamps."""
GRACE_SECONDS = 30
"""Time that the containers of a job have to end after one of them died, before the engine kills them."""


@dataclass
class _HostLog:
    """Output and end of one host's container."""

    host: Host
    shown: collections.deque[tuple[str, str]] = field(default_factory=lambda: collections.deque(maxlen=KEPT_LINES))
    """Time stamp and text of the lines printed last, so that no line is printed twice after a lost connection."""
    lines: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=KEPT_LINES))
    row: JobRow | None = None
    lost: bool = False
    """The host has not answered for PATIENCE_SECONDS."""
    cut_off: bool = False
    """The other hosts do not reach the host either: the job cannot go on."""
    removed: bool = False
    """The container was removed."""
    problem: BaseException | None = None
    """Exception that ended the thread of this host, such as BrokenPipeError."""
    ended: float = 0.0

    @property
    def over(self) -> bool:
        return self.row is not None or self.lost or self.removed or self.cut_off

    @property
    def bad(self) -> bool:
        """True if the container failed, or if its end is not known."""
        return self.row is None or self.row.exit_code != 0

    @property
    def stopped(self) -> bool:
        """True if the container ended because of SIGINT or SIGTERM."""
        return self.row is not None and self.row.exit_code in SIGNALLED


LOST_GRACE_SECONDS = 5
"""The same, after a host was lost."""


class Left(KeyboardInterrupt):
    """Exception for a user who left a running job. The job continues."""


class JobFollower:
    """Printer of a job's output; its standard error is kept apart. `say` receives the messages of the kit itself."""

    def __init__(
        self,
        job: RunningJob,
        ssh: Ssh | None = None,
        out: TextIO | None = None,
        say: Callable[[str], None] | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.job, self.ssh, self.out, self.err = job, ssh or Ssh(), out or sys.stdout, err or sys.stderr
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._logs = [_HostLog(host) for host in job.hosts]
        self._width = max(len(host.name) for host in job.hosts) if len(job.hosts) > 1 else 0
        self._lock = threading.Lock()
        self._leave = threading.Event()
        self._stopping = False

    def follow(self, new_only: bool = False) -> None:
        """Print output until the job has ended.

        Raises the error that the job failed with, or Left after a second Ctrl-C. Errors while printing, such as
        BrokenPipeError, are raised too; the job then continues.
        """
        threads = [
            threading.Thread(target=self._follow_or_report, args=(log, new_only), name=log.host.name, daemon=True)
            for log in self._logs
        ]
        for thread in threads:
            thread.start()
        if len(self._logs) > 1 and self.job.addresses:
            words = (self.job, self.ssh, self._alive, self._cut_off, self._leave.wait)
            threading.Thread(target=watch_hosts, args=words, name="hosts", daemon=True).start()
        interrupts = 0
        while any(thread.is_alive() and not log.cut_off for thread, log in zip(threads, self._logs, strict=True)):
            try:
                # Thread.join is not used: when Ctrl-C interrupts it, Python 3.11 regards the thread as ended.
                self._leave.wait(0.2)
                self._watch()
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts > 1:
                    self._leave.set()
                    self.say(f"Left. {self.job.name} continues: mixtral-run logs -f {self.job.name}")
                    raise Left from None
                self.say(
                    f"\n{self.job.name} is running. Ctrl-C again leaves it running; to end it: "
                    f"mixtral-run stop {self.job.name}"
                )
        self._leave.set()
        self._raise_if_bad()

    def _alive(self) -> list[Host]:
        return [log.host for log in self._logs if not log.over]

    def _cut_off(self, host: Host) -> None:
        next(log for log in self._logs if log.host == host).cut_off = True

    def _follow_or_report(self, log: _HostLog, new_only: bool) -> None:
        try:
            self._follow_host(log, new_only)
        except BaseException as problem:
            # An exception in a thread would only be printed: `follow` raises it.
            log.problem = problem
            self._leave.set()

    def _follow_host(self, log: _HostLog, new_only: bool) -> None:
        since = ["--tail", "0"] if new_only else []
        while not self._leave.is_set():
            self._stream(log, ["--follow", *(_since(log) or since)])
            row = self._row_of(log)
            if row is not None and not row.running:
                # The stream ends with the container and may miss its last lines.
                self._stream(log, _since(log) or since)
                log.row = row
            if row is None or not row.running:
                log.ended = time.monotonic()
                return
            self._leave.wait(RECONNECT_SECONDS)

    def _row_of(self, log: _HostLog) -> JobRow | None:
        """Return the container on a host as soon as the host answers.

        Returns None if the host has no such container, is lost, or if the user left.
        """
        began, reported = time.monotonic(), False
        while not self._leave.is_set():
            rows, errors = list_jobs([log.host], self.ssh)
            row = next((row for row in rows if row.job == self.job.name), None)
            if row is not None or not errors:
                if reported:
                    self.say(f"{log.host.name} answers again")
                log.removed = row is None
                return row
            if time.monotonic() - began >= PATIENCE_SECONDS:
                log.lost = True
                return None
            if not reported:
                reported = True
                minutes = PATIENCE_SECONDS // 60
                self.say(f"! {errors[0].what} {self.job.name} may continue there; retrying for {minutes} minutes")
            self._leave.wait(RECONNECT_SECONDS)
        return None

    def _stream(self, log: _HostLog, options: list[str]) -> None:
        """Print the engine's log without the lines that were printed before."""
        again = collections.Counter(log.shown)
        words = ["sh", "-c", ENGINE_SCRIPT, "docker", "logs", "--timestamps", *options, self.job.name]
        _stream_apart(
            self.ssh,
            log.host,
            words,
            self.out,
            self.err,
            lambda line, to: self._line(log, line, again, to),
            self._leave,
        )

    def _line(self, log: _HostLog, line: str, again: collections.Counter[tuple[str, str]], to: TextIO) -> None:
        stamp, _, text = line.partition(" ")
        if not (len(stamp) > 20 and stamp[4] == "-" and stamp.endswith("Z")):
            text = line  # a message of ssh or of the engine
        elif again[stamp, text] > 0:
            again[stamp, text] -= 1
            return
        else:
            log.shown.append((stamp, text))
        log.lines.append(text)
        with self._lock:
            print(_prefixed(log.host, self._width, text), file=to, flush=True)

    def _watch(self) -> None:
        """Stop the containers of the other hosts after one has failed: they would wait for it until a timeout.

        A host that does not answer stops nothing, because its container may be fine. Neither does a stopped container:
        a stop request goes to all hosts, and the others may still be saving.
        """
        dead = [log for log in self._logs if log.over and log.bad and not log.lost and not log.stopped]
        alive = [log for log in self._logs if not log.over]
        if not dead or not alive or self._stopping:
            return
        self._stopping = True
        row = dead[0].row
        how = "has no container of the job" if row is None else f"ended with exit code {row.exit_code}"
        if dead[0].cut_off:
            how = "is lost: neither this machine nor the other hosts reach it"
        # Without all of its processes the job cannot save.
        grace = LOST_GRACE_SECONDS if dead[0].cut_off else GRACE_SECONDS
        others = ", ".join(log.host.name for log in alive)
        self.say(f"✗ {dead[0].host.name} {how}: stopping the job on {others}")
        words = ("stop", "--time", str(grace), self.job.name)
        threading.Thread(
            target=lambda: self.ssh.each(
                [log.host for log in alive],
                lambda host: engine(self.ssh, host, *words, timeout_seconds=grace + 30),
            ),
            daemon=True,
        ).start()

    def _raise_if_bad(self) -> None:
        for log in self._logs:
            if log.problem is not None:
                raise log.problem
        bad = [log for log in self._logs if log.bad]
        if not bad:
            return
        for log in bad:
            if log.cut_off:
                raise HostLost(self.job, log.host)
        # The container that ended first is the cause; the others fail because of it. In a job that was stopped, the
        # cause is a container that ended for another reason.
        first = min(bad, key=lambda log: (log.stopped, log.ended))
        raise job_error(self.job, first.host, first.row, list(first.lines))


def _stream_apart(
    ssh: Ssh,
    host: Host,
    words: Sequence[str],
    out: TextIO,
    err: TextIO,
    on_line: Callable[[str, TextIO], None],
    stop: threading.Event | None = None,
) -> None:
    """Pass each line of a command to `on_line` with the local stream that it belongs to, `out` or `err`."""
    # If both go to one place (a terminal, or `2>&1`), one pipe keeps the order in which ssh writes the lines.
    apart = None if _same_place(out, err) else lambda line: on_line(line, err)
    ssh.stream(host, words, lambda line: on_line(line, out), stop, apart)


def _prefixed(host: Host, width: int, text: str) -> str:
    """Return output of a host with the host's name before every line; without names if `width` is 0.

    A text with newlines was redrawn with carriage returns: none of its lines may pass for one of another host.
    """
    prefix = f"{host.name:<{width}} | " if width else ""
    return "\n".join(prefix + line for line in text.split("\n"))


def _same_place(out: TextIO, err: TextIO) -> bool:
    try:
        return os.path.sameopenfile(out.fileno(), err.fileno())
    except (OSError, ValueError):  # not files
        return False


def _since(log: _HostLog) -> list[str]:
    """Return the option that requests new lines and the OVERLAP_LINES before them."""
    stamps = [stamp for stamp, _ in log.shown]
    return ["--since", min(stamps[-OVERLAP_LINES:])] if stamps else []


def job_error(job: RunningJob, host: Host, row: JobRow | None, lines: list[str]) -> MixtralRunError:
    """Return the error for a job's end on a host, with cause and next command if it is a known failure."""
    if row is not None and row.exit_code in SIGNALLED:
        return Stopped(
            f"{job.name} was stopped on {host.name}.",
            where=host.target,
            next_command="the same command with --resume continues from the last checkpoint"
            if job.verb in ("finetune", "align")
            else f"mixtral-run logs {job.name}",
        )
    printed = [line for line in lines if line.strip()]
    if row is not None and row.out_of_memory:
        # A program that the kernel kills cannot print the reason.
        printed.append("killed (SIGKILL): the memory was full")
    known = recognize("\n".join(printed))
    record_failures({job.name: "\n".join(printed[-60:]), host.name: "\n".join(printed[-60:])})
    problems = [f"{known.title}: {known.cause}"] if known else []
    commands = known.commands_for(host.name)[0].replace("JOB", job.name) if known else f"mixtral-run logs {job.name}"
    if row is None:
        return HostError(
            f"{job.name} was lost: {host.name} cannot be reached, where it may continue, or its container is gone.",
            where=host.target,
            next_command=f"mixtral-run jobs; mixtral-run logs {job.name}",
        )
    # Exit code 1 comes from torchrun or from a traceback. The codes of a serving engine are not the kit's.
    kind = EXIT_CODES.get(row.exit_code, TrainingError) if row.exit_code > 1 else TrainingError
    kind = HostError if job.verb == "serve" else kind
    found = f"exit code {row.exit_code}"
    if row.out_of_memory or row.exit_code == 137:
        found += ": killed, by a user or because memory ran out"
    return kind(
        f"{job.name} failed on {host.name}.", where=host.target, found=found, problems=problems, next_command=commands
    )


def show_logs(
    rows: list[JobRow],
    ssh: Ssh | None = None,
    out: TextIO | None = None,
    tail: str = "all",
    err: TextIO | None = None,
) -> None:
    """Print the output of a job so far."""
    ssh, out, err = ssh or Ssh(), out or sys.stdout, err or sys.stderr
    width = max(len(row.host.name) for row in rows) if len(rows) > 1 else 0

    def show(row: JobRow, line: str, to: TextIO) -> None:
        print(_prefixed(row.host, width, line), file=to, flush=True)

    for row in rows:
        words = ["sh", "-c", ENGINE_SCRIPT, "docker", "logs", "--tail", tail, row.job]
        _stream_apart(ssh, row.host, words, out, err, functools.partial(show, row))

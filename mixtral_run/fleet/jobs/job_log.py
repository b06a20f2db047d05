"""Following a job: its output live from every host, until it ends or the person leaves. Leaving does not stop it."""

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
from mixtral_run.fleet.ssh.connection import Ssh

RECONNECT_SECONDS = 2.0
PATIENCE_SECONDS = 600
"""How long a host may not answer before it counts as lost. Its part of the job goes on all the same."""
KEPT_LINES = 400
OVERLAP_LINES = 50
"""Lines that are asked for again when a connection was lost. The engine takes a container's two outputs up side by
side, so that its log is not quite in the order of its time stamps."""
GRACE_SECONDS = 30
"""How long the hosts of a job may go on after one of them died, before they are stopped."""


@dataclass
class _HostLog:
    """One host's output and its end."""

    host: Host
    shown: collections.deque[tuple[str, str]] = field(default_factory=lambda: collections.deque(maxlen=KEPT_LINES))
    """Time stamp and text of what was shown last, so that nothing is shown twice after a lost connection."""
    count: int = 0
    lines: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=KEPT_LINES))
    row: JobRow | None = None
    lost: bool = False
    """It has not answered for too long."""
    removed: bool = False
    """Somebody removed the container."""
    problem: BaseException | None = None
    """What ended the following itself: nobody reads any more, or a fault of ours."""
    ended: float = 0.0

    @property
    def over(self) -> bool:
        return self.row is not None or self.lost or self.removed

    @property
    def bad(self) -> bool:
        """Whether it did not end well; also where its end is not known."""
        return self.row is None or self.row.exit_code != 0

    @property
    def stopped(self) -> bool:
        """Whether it ended because it was asked to."""
        return self.row is not None and self.row.exit_code in SIGNALLED


class Left(KeyboardInterrupt):
    """The person left; the job goes on."""


class JobFollower:
    """Shows a job's output, its errors and progress apart. `say` gets our own words, which are not the job's."""

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
        """Show output until the job is over. Raises what the job failed with, or Left after a second Ctrl-C.

        What keeps the output from being shown, BrokenPipeError among it, is raised as well; the job goes on.
        """
        threads = [
            threading.Thread(target=self._follow_or_tell, args=(log, new_only), name=log.host.name, daemon=True)
            for log in self._logs
        ]
        for thread in threads:
            thread.start()
        interrupts = 0
        while any(thread.is_alive() for thread in threads):
            try:
                # Not Thread.join: when Ctrl-C interrupts it, Python 3.11 takes the thread for ended.
                self._leave.wait(0.2)
                self._watch()
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts > 1:
                    self._leave.set()
                    self.say(f"Left. {self.job.name} goes on: mixtral-run logs -f {self.job.name}")
                    raise Left from None
                self.say(
                    f"\n{self.job.name} is running. Ctrl-C again leaves it running; to end it: "
                    f"mixtral-run stop {self.job.name}"
                )
        self._raise_if_bad()

    def _follow_or_tell(self, log: _HostLog, new_only: bool) -> None:
        try:
            self._follow_host(log, new_only)
        except BaseException as problem:
            # A thread's own end is nobody's business: `follow` raises it.
            log.problem = problem
            self._leave.set()

    def _follow_host(self, log: _HostLog, new_only: bool) -> None:
        since = ["--tail", "0"] if new_only else []
        while not self._leave.is_set():
            self._stream(log, ["--follow", *(_since(log) or since)])
            row = self._row_of(log)
            if row is not None and not row.running:
                # The stream ends with the container, and its last words may have come too late for it.
                self._stream(log, _since(log) or since)
                log.row = row
            if row is None or not row.running:
                log.ended = time.monotonic()
                return
            self._leave.wait(RECONNECT_SECONDS)

    def _row_of(self, log: _HostLog) -> JobRow | None:
        """How the job is on a host, as soon as that answers; None where it has none, or none is waited for any more."""
        began, told = time.monotonic(), False
        while not self._leave.is_set():
            rows, errors = list_jobs([log.host], self.ssh)
            if not errors:
                if told:
                    self.say(f"{log.host.name} answers again")
                row = next((row for row in rows if row.job == self.job.name), None)
                log.removed = row is None
                return row
            if time.monotonic() - began >= PATIENCE_SECONDS:
                log.lost = True
                return None
            if not told:
                told = True
                self.say(
                    f"! {errors[0].what} {self.job.name} may go on there; trying for {PATIENCE_SECONDS // 60} minutes"
                )
            self._leave.wait(RECONNECT_SECONDS)
        return None

    def _stream(self, log: _HostLog, options: list[str]) -> None:
        """Show what the engine has, without what was shown before."""
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
            text = line  # ssh's own words, or the engine's
        elif again[stamp, text] > 0:
            again[stamp, text] -= 1
            return
        else:
            log.shown.append((stamp, text))
            log.count += 1
        log.lines.append(text)
        prefix = f"{log.host.name:<{self._width}} | " if self._width else ""
        with self._lock:
            print(prefix + text, file=to, flush=True)

    def _watch(self) -> None:
        """Where one host's part has failed, stop the others': they would wait for it until a time-out.

        A host that does not answer may be well, and so the job. Whoever stopped one host's part stopped all, and the
        others may be saving still.
        """
        dead = [log for log in self._logs if log.over and log.bad and not log.lost and not log.stopped]
        alive = [log for log in self._logs if not log.over]
        if not dead or not alive or self._stopping:
            return
        self._stopping = True
        row = dead[0].row
        how = "has no container of it any more" if row is None else f"ended with exit code {row.exit_code}"
        others = ", ".join(log.host.name for log in alive)
        self.say(f"✗ {dead[0].host.name} {how}: stopping the job on {others}")
        words = ("stop", "--time", str(GRACE_SECONDS), self.job.name)
        threading.Thread(
            target=lambda: self.ssh.each(
                [log.host for log in alive],
                lambda host: engine(self.ssh, host, *words, timeout_seconds=GRACE_SECONDS + 30),
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
        # Others fail because one did: the one that ended first. Of a job that was stopped, the one that did not obey.
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
    """Hand over a command's lines, each with the one of ours that it belongs to."""
    # What goes to one place, a terminal or `2>&1`, comes over one pipe, in the order in which ssh has it.
    apart = None if _same_place(out, err) else lambda line: on_line(line, err)
    ssh.stream(host, words, lambda line: on_line(line, out), stop, apart)


def _same_place(out: TextIO, err: TextIO) -> bool:
    try:
        return os.path.sameopenfile(out.fileno(), err.fileno())
    except (OSError, ValueError):  # not files
        return False


def _since(log: _HostLog) -> list[str]:
    """The option that asks for what is new and a little of what was shown."""
    stamps = [stamp for stamp, _ in log.shown]
    return ["--since", min(stamps[-OVERLAP_LINES:])] if stamps else []


def job_error(job: RunningJob, host: Host, row: JobRow | None, lines: list[str]) -> MixtralRunError:
    """What a job's end on a host means, with cause and command where it is a known failure."""
    if row is not None and row.exit_code in SIGNALLED:
        return Stopped(
            f"{job.name} was stopped on {host.name}.",
            where=host.target,
            next_command="the same command with --resume goes on from what was saved"
            if job.verb == "finetune"
            else f"mixtral-run logs {job.name}",
        )
    told = [line for line in lines if line.strip()]
    if row is not None and row.out_of_memory:
        # A program that the kernel kills prints nothing of it.
        told.append("killed (SIGKILL): the memory was full")
    known = recognize("\n".join(told))
    record_failures({job.name: "\n".join(told[-60:]), host.name: "\n".join(told[-60:])})
    problems = [f"{known.title}: {known.cause}"] if known else []
    commands = known.commands_for(host.name)[0].replace("JOB", job.name) if known else f"mixtral-run logs {job.name}"
    if row is None:
        return HostError(
            f"{job.name} was lost: {host.name} cannot be reached, where it may go on, or its container is gone.",
            where=host.target,
            next_command=f"mixtral-run jobs; mixtral-run logs {job.name}",
        )
    # 1 is torchrun's own, or a traceback's.
    kind = EXIT_CODES.get(row.exit_code, TrainingError) if row.exit_code > 1 else TrainingError
    found = f"exit code {row.exit_code}"
    if row.out_of_memory or row.exit_code == 137:
        found += ": killed, by somebody or because memory ran out"
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
    """Print what a job has printed so far."""
    ssh, out, err = ssh or Ssh(), out or sys.stdout, err or sys.stderr
    width = max(len(row.host.name) for row in rows) if len(rows) > 1 else 0

    def show(row: JobRow, line: str, to: TextIO) -> None:
        print((f"{row.host.name:<{width}} | " if width else "") + line, file=to, flush=True)

    for row in rows:
        words = ["sh", "-c", ENGINE_SCRIPT, "docker", "logs", "--tail", tail, row.job]
        _stream_apart(ssh, row.host, words, out, err, functools.partial(show, row))

"""Live output of a job's pods, until the job ends or the user leaves. Leaving does not stop the job."""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TextIO

from mixtral_run.errors import HostError, MixtralRunError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.job_log import Left, job_error
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob
from mixtral_run.fleet.launchers.kubernetes.kubectl import Kubectl, logs_argv
from mixtral_run.fleet.launchers.kubernetes.state import Found, Pod
from mixtral_run.fleet.launchers.launcher import Say
from mixtral_run.fleet.launchers.records import JobRecord

POLL_SECONDS = 3.0
PATIENCE_SECONDS = 600.0
"""Time without an answer of the cluster after which the job counts as lost. It may continue."""
KEPT_LINES = 400


@dataclass
class _PodLog:
    """Output of one pod. shown: time stamp and text of the last lines, so that none is printed twice."""

    pod: Pod
    shown: collections.deque[tuple[str, str]] = field(default_factory=lambda: collections.deque(maxlen=KEPT_LINES))
    thread: threading.Thread | None = None


class PodFollower:
    """Printer of the output of all pods of a job, those of later attempts included.

    look: returns the state of the job in the cluster; raises HostError if the cluster does not answer.
    """

    def __init__(
        self, kubectl: Kubectl, record: JobRecord, look: Callable[[], Found], say: Say, out: TextIO | None = None
    ) -> None:
        self.kubectl, self.record, self.look, self.say = kubectl, record, look, say
        self.out = out or sys.stdout
        self.container = record.extra["container"]
        self._many = record.extra["num_nodes"] != "1"
        self._logs: dict[str, _PodLog] = {}
        self._lock = threading.Lock()
        self._leave = threading.Event()
        self._problem: BaseException | None = None
        self._said = ""

    def follow(self) -> None:
        """Print output until the job has ended. Raises the error that it ended with, or Left after a second Ctrl-C."""
        interrupts, found = 0, None
        while found is None or found.running:
            try:
                found = self._looked()
                self._report(found)
                self.print_new(found.pods)
                if found.running:
                    self._leave.wait(POLL_SECONDS)
                else:
                    self.finish()
                if self._problem is not None:
                    raise self._problem
            except KeyboardInterrupt:
                interrupts += 1
                self._interrupted(interrupts)
        if found.state != "complete":
            raise self._error(found)

    def print_new(self, pods: tuple[Pod, ...], *, new_only: bool = False) -> None:
        """Begin to print the output of pods that were not known before. new_only: not what they have printed so far."""
        for pod in pods:
            known = self._logs.get(pod.name)
            if known is not None:
                known.pod = pod
            elif pod.has_output:
                log = self._logs[pod.name] = _PodLog(pod)
                log.thread = threading.Thread(target=self._print_pod, args=(log, new_only), daemon=True)
                log.thread.start()

    def finish(self, seconds: float = 30.0) -> None:
        """Wait until all output is printed. All pods have ended, those that are gone too."""
        for log in self._logs.values():
            log.pod = log.pod if log.pod.ended else replace(log.pod, phase="failed")
        until = time.monotonic() + seconds
        while any(log.thread and log.thread.is_alive() for log in self._logs.values()) and time.monotonic() < until:
            # Thread.join is not used: when Ctrl-C interrupts it, Python 3.11 regards the thread as ended.
            self._leave.wait(0.05)
        self._leave.set()

    def _looked(self) -> Found:
        """Return the state of the job as soon as the cluster answers. Raises HostError after PATIENCE_SECONDS."""
        began, reported = time.monotonic(), False
        while True:
            try:
                found = self.look()
            except HostError as error:
                if time.monotonic() - began >= PATIENCE_SECONDS:
                    raise
                if not reported:
                    minutes = PATIENCE_SECONDS / 60
                    self.say(f"! {error.what} {self.record.name} may continue; retrying for {minutes:g} minutes")
                    reported = True
                self._leave.wait(POLL_SECONDS)
            else:
                if reported:
                    self.say("The cluster answers again")
                return found

    def _report(self, found: Found) -> None:
        """Report why the job does not run, each reason once."""
        text = f"{self.record.name} is {found.state}: {found.reason}" if found.running and found.reason else ""
        if text and text != self._said:
            self.say(text)
        self._said = text or self._said

    def _interrupted(self, interrupts: int) -> None:
        name = self.record.name
        if interrupts > 1:
            self._leave.set()
            self.say(f"Left. {name} continues: mixtral-run logs -f {name}")
            raise Left from None
        self.say(f"\n{name} is running. Ctrl-C again leaves it running; to end it: mixtral-run stop {name}")

    def _print_pod(self, log: _PodLog, new_only: bool) -> None:
        try:
            tail: int | None = 0 if new_only else None
            while not self._leave.is_set():
                had_ended = log.pod.ended
                self._stream(log, follow=not had_ended, tail=tail)
                if had_ended:
                    return
                # The stream ends with the container, or with a connection that was lost. The next look tells which.
                self._leave.wait(POLL_SECONDS / 2)
                tail = None if log.shown else tail
        except BaseException as problem:
            # An exception in a thread would only be printed: `follow` raises it.
            self._problem = problem
            self._leave.set()

    def _stream(self, log: _PodLog, *, follow: bool, tail: int | None) -> None:
        again = collections.Counter(log.shown)
        since = log.shown[-1][0] if log.shown else ""
        argv = logs_argv(
            self.kubectl.cluster, log.pod.name, self.container, follow=follow, since=since, tail=tail, stamps=True
        )
        self.kubectl.stream(argv, lambda line: self._line(log, line, again), self._leave)

    def _line(self, log: _PodLog, line: str, again: collections.Counter[tuple[str, str]]) -> None:
        stamp, _, text = line.partition(" ")
        if not (len(stamp) >= 20 and stamp[4] == "-" and stamp[10] == "T"):
            return  # a message of kubectl: the state of the job tells what it means
        if again[stamp, text] > 0:
            again[stamp, text] -= 1
            return
        log.shown.append((stamp, text))
        prefix = f"{log.pod.index} | " if self._many else ""
        with self._lock:
            # A text with newlines was redrawn with carriage returns.
            print("\n".join(prefix + part for part in text.split("\n")), file=self.out, flush=True)

    def _error(self, found: Found) -> MixtralRunError:
        name, cause = self.record.name, found.cause
        if found.state == "gone":
            return HostError(
                f"{name} was removed from the cluster: stopped or deleted by somebody.",
                where=str(self.kubectl.cluster),
                next_command="the same command with --resume auto continues from the last checkpoint",
            )
        if cause is None or cause.exit_code is None:
            return HostError(
                f"{name} failed.",
                where=str(self.kubectl.cluster),
                found=found.reason or "no reason is given",
                next_command="the same command with --resume auto continues from the last checkpoint",
            )
        lines = [text for _, text in self._logs[cause.name].shown] if cause.name in self._logs else []
        host = Host(cause.node or cause.name, cause.node or cause.name)
        row = JobRow(
            name, self.record.verb, host, "exited", cause.exit_code, cause.out_of_memory, "", self.record.output
        )
        error = job_error(RunningJob(name, self.record.verb, (host,)), host, row, lines)
        error.where = f"{cause.name} on {cause.node or 'no node'}"
        return error

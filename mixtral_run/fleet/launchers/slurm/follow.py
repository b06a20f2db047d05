"""Live output of a Slurm job until its end. Leaving does not stop the job."""

from __future__ import annotations

import collections
import threading
import time

from mixtral_run.errors import EXIT_CODES, MixtralRunError, Stopped, TrainingError
from mixtral_run.fleet.explain.explain import recognize, record_failures
from mixtral_run.fleet.jobs.job_log import Left
from mixtral_run.fleet.launchers.launcher import Say
from mixtral_run.fleet.launchers.records import JobRecord
from mixtral_run.fleet.launchers.slurm.commands import JobLine, SlurmSite, job_lines
from mixtral_run.fleet.launchers.slurm.script import LOG

POLL_SECONDS = 3.0
KEPT_LINES = 400
PATIENCE_SECONDS = 600.0
"""Time without an answer after which the following ends. The job continues."""


class SlurmFollower:
    """Printer of a job's log, and of its states as they change."""

    def __init__(self, record: JobRecord, site: SlurmSite, say: Say) -> None:
        self.record, self.site, self.say = record, site, say
        self._log = f"{record.extra['folder']}/{LOG}"
        self._count = 0
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def follow(self) -> None:
        """Print until the job has ended. Raise its error, or Left after a second Ctrl-C."""
        thread = threading.Thread(target=self._stream, daemon=True)
        thread.start()
        interrupts = 0
        last: JobLine | None = None
        try:
            while True:
                try:
                    line = self._state()
                    self._report_change(last, line)
                    last = line
                    if line.ended:
                        break
                    time.sleep(POLL_SECONDS)
                except KeyboardInterrupt:
                    interrupts += 1
                    name = self.record.name
                    if interrupts > 1:
                        self.say(f"Left. {name} continues: mixtral-run logs -f {name}")
                        raise Left from None
                    self.say(f"\n{name} continues. Ctrl-C again leaves it; to end it: mixtral-run stop {name}")
        finally:
            self._stop.set()
        thread.join(10)
        self._print_rest()
        error = job_error(self.record, last, list(self._lines), self.site)
        if error is not None:
            raise error

    def _state(self) -> JobLine:
        """Return the job's state as soon as the site answers."""
        began, reported = time.monotonic(), False
        while True:
            try:
                (line,) = job_lines(
                    self.site, [(self.record.scheduler_id, self.record.name, self.record.extra["folder"])]
                )
            except MixtralRunError as error:
                if time.monotonic() - began > PATIENCE_SECONDS:
                    raise
                if not reported:
                    self.say(f"! {error.what} {error.found or ''} The job continues; retrying")
                reported = True
                time.sleep(POLL_SECONDS)
                continue
            if reported:
                self.say(f"{self.site.name} answers again")
            return line

    def _report_change(self, last: JobLine | None, line: JobLine) -> None:
        if last is not None and (last.state, last.reason) == (line.state, line.reason):
            return
        if line.state == "pending":
            self.say(f"… waits for nodes: {line.reason or 'no reason given'}")
        elif line.state == "running":
            self.say(f"… runs on {line.nodes}")

    def _stream(self) -> None:
        while not self._stop.is_set():
            words = ["tail", "-n", f"+{self._count + 1}", "-F", self._log]
            self.site.stream(words, self._print, self._stop)
            self._stop.wait(POLL_SECONDS)

    def _print_rest(self) -> None:
        answer = self.site.run(["tail", "-n", f"+{self._count + 1}", self._log])
        for line in answer.output.splitlines():
            self._print(line)

    def _print(self, line: str) -> None:
        with self._lock:
            self._count += 1
            self._lines.append(line)
            print(line, flush=True)


def job_error(record: JobRecord, line: JobLine | None, lines: list[str], site: SlurmSite) -> MixtralRunError | None:
    """Return the error for the end of a job; None if it ended well."""
    if line is None or line.state == "completed":
        return None
    name, logs = record.name, f"mixtral-run logs {record.name}"
    if line.exit_code in (130, 143) or line.state == "cancelled":
        return Stopped(
            f"{name} was stopped.",
            where=line.nodes or site.name,
            found=line.state,
            next_command="the same command with --resume auto continues from the last checkpoint"
            if record.verb in ("finetune", "align")
            else logs,
        )
    known = recognize("\n".join(lines))
    record_failures({name: "\n".join(lines[-60:])})
    code = line.exit_code
    kind = EXIT_CODES.get(code, TrainingError) if code and code > 1 else TrainingError
    return kind(
        f"{name} failed.",
        where=line.nodes or site.name,
        found=f"{line.state}{'' if code is None else f', exit code {code}'}",
        problems=[f"{known.title}: {known.cause}"] if known else [],
        next_command=known.commands_for(site.name)[0].replace("JOB", name) if known else logs,
    )

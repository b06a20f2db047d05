"""Find the process of a job that hangs, name it, log the stack of every process, and end the job.

A process that waits in a collective longer than the limit shows that another one does not come. The launcher looks for
that one: it is stopped, does not beat, works outside of collectives, or is behind the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mixtral_run.errors import TrainingError
from mixtral_run.launch.heartbeat import STACK_SIGNAL, Beat, State, read_beat

LOOK_SECONDS = 0.5
LONGEST_GAP = 5.0
"""Seconds that count at most between two looks: a laptop that slept or a paused container is no hang."""
SILENT_SECONDS = 5.0
"""Seconds without a beat after which a process counts as not running Python code."""
STACK_SECONDS = 2.0
"""Time that the processes have to write their stacks."""
_LONGEST_STACK = 100


@dataclass
class _Seen:
    """The last content of a heartbeat, and the seconds since its notes and its beats changed."""

    beat: Beat
    unchanged: float = 0.0
    silent: float = 0.0

    def update(self, beat: Beat, seconds: float) -> None:
        self.unchanged = 0.0 if beat.events != self.beat.events else self.unchanged + seconds
        self.silent = 0.0 if beat.beats != self.beat.beats else self.silent + seconds
        self.beat = beat


@dataclass
class HangWatch:
    """The look-out for one job on this machine. error: the error of a hang that was found."""

    folder: Path
    error: TrainingError | None = None
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def look(self, seconds: float) -> None:
        """Read all heartbeats, `seconds` after the last look. End the job's processes if one of them hangs."""
        for file in self.folder.glob("rank-*.heartbeat"):
            beat = read_beat(file)
            rank = int(file.stem.removeprefix("rank-"))
            if beat is not None and rank in self._seen:
                self._seen[rank].update(beat, min(seconds, LONGEST_GAP))
            elif beat is not None:
                self._seen[rank] = _Seen(beat)
        waits = (
            each.beat.state is not State.WORKING and each.unchanged >= each.beat.limit for each in self._seen.values()
        )
        if self.error is None and any(waits):
            self._end_hung()

    def _end_hung(self) -> None:
        stopped = {rank for rank, seen in self._seen.items() if _is_stopped(seen.beat.pid)}
        limit = max(seen.beat.limit for seen in self._seen.values())
        problems = describe_hang(self._seen_now(), stopped)
        self._log_stacks(stopped)
        self.error = TrainingError(
            "The job hangs: some of its processes wait for one that does not come.",
            problems=problems,
            expected=f"a process waits for the others for less than {limit:,.0f} s (--distributed-timeout-minutes)",
            next_command="the lines above this one show the stack of every process; --resume continues a fine-tuning",
        )
        for seen in self._seen.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(seen.beat.pid, signal.SIGKILL)

    def _seen_now(self) -> dict[int, tuple[Beat, bool]]:
        return {rank: (seen.beat, seen.silent >= SILENT_SECONDS) for rank, seen in sorted(self._seen.items())}

    def _log_stacks(self, stopped: set[int]) -> None:
        """Print the stack of every process to stderr."""
        for rank, seen in self._seen.items():
            if rank not in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seen.beat.pid, STACK_SIGNAL)
        time.sleep(STACK_SECONDS)
        for rank in sorted(self._seen):
            lines = self._stack_of(rank) if rank not in stopped else ["stopped: it cannot write its stack"]
            for line in lines:
                print(f"[rank {rank}] {line}", file=sys.stderr)
        sys.stderr.flush()

    def _stack_of(self, rank: int) -> list[str]:
        """Return the lines that a process wrote at STACK_SIGNAL."""
        try:
            text = (self.folder / f"rank-{rank}.stack").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return [f"no stack: {error.strerror}"]
        return text.splitlines()[:_LONGEST_STACK] or [f"no stack within {STACK_SECONDS:g} s"]


def describe_hang(beats: Mapping[int, tuple[Beat, bool]], stopped: set[int]) -> list[str]:
    """Return a line for each process that hangs, then a line for those that wait.

    Args:
        beats: by rank, the heartbeat, and True if it has not beaten for SILENT_SECONDS.
        stopped: ranks that a signal has stopped.
    """
    silent = {rank for rank, (_, is_silent) in beats.items() if is_silent} - stopped
    working = {rank for rank, (beat, _) in beats.items() if beat.state is State.WORKING}
    fewest = min(beat.num_collectives for beat, _ in beats.values())
    behind = {rank for rank, (beat, _) in beats.items() if beat.num_collectives == fewest}
    reasons = (
        (stopped, "is stopped by a signal (SIGSTOP, Ctrl-Z or a debugger)"),
        (silent, "runs no Python code: it is in an endless loop or a call that does not return"),
        (working, "does not come to the collective that the others wait in: an endless loop, or work that is too long"),
        (behind if len(behind) < len(beats) else set(), "is behind the others"),
    )
    hung: dict[int, str] = {}
    for ranks, reason in reasons:
        if ranks and not hung:
            hung = dict.fromkeys(sorted(ranks), reason)
    lines = [f"rank {rank} (process {beats[rank][0].pid}) {why}; {_last(beats[rank][0])}" for rank, why in hung.items()]
    if not hung:
        lines = ["every process of this machine waits: the one that hangs is on another machine, or a GPU does not end"]
    return lines + [f"rank {rank} waits; {_last(beat)}" for rank, (beat, _) in beats.items() if rank not in hung]


def _last(beat: Beat) -> str:
    """Return a text of the last step and the last collective."""
    step = f"last step {beat.step}" if beat.step else "before the first step"
    name = f"{beat.collective} (number {beat.num_collectives:,})" if beat.collective else "none"
    return f"{step}, last collective {name}"


def _is_stopped(pid: int) -> bool:
    """Return True if a signal or a debugger has stopped the process."""
    try:
        # After the name in parentheses, which may hold any character.
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "tT"


@contextmanager
def watching(folder: Path) -> Iterator[HangWatch]:
    """Look for hung processes in the background while the block runs. folder: of their heartbeats."""
    watch = HangWatch(folder)
    over = threading.Event()

    def run() -> None:
        last = time.monotonic()
        while not over.wait(LOOK_SECONDS):
            now = time.monotonic()
            watch.look(now - last)
            last = now

    thread = threading.Thread(target=run, name="hang watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()

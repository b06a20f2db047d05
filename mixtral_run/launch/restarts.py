"""`python -m mixtral_run.launch.restarts FOLDER PROGRAM…`: a program that an engine starts again after failures.

The engine restarts a container whatever its exit code is, and at once. This process makes up for both: it waits longer
before each attempt, adds `--resume auto` to a program that can take it, and does not repeat what repeating cannot cure.
FOLDER outlives the container. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from mixtral_run.errors import INCURABLE

STATE = "attempts.json"
SHORTEST_SECONDS, LONGEST_SECONDS = 5.0, 300.0
"""Time before the second attempt, and before any later one."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Attempts:
    """Attempts of a job so far. final: the exit code of one that must not be repeated."""

    count: int = 0
    final: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Attempts:
        """Read the state of a job; a missing or damaged file is that of the first attempt."""
        try:
            values = json.loads((folder / STATE).read_text(encoding="utf-8"))
            final = values["final"]
            return cls(int(values["count"]), None if final is None else int(final))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, folder: Path) -> None:
        """Replace the state of a job."""
        partial = folder / f"{STATE}.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.rename(folder / STATE)


def wait_seconds(count: int) -> float:
    """Return the time before the attempt that follows `count` others."""
    return min(LONGEST_SECONDS, SHORTEST_SECONDS * 2 ** min(count - 1, 10)) if count else 0.0


def run(folder: Path, program: Sequence[str], *, resumes: bool) -> int:
    """Run one attempt and return the exit code of the container. resumes: the program knows `--resume auto`."""
    before = Attempts.read(folder)
    if before.final is not None:
        return before.final
    attempt = _Attempt()
    for number in STOP_SIGNALS:
        signal.signal(number, attempt.pass_on)
    if before.count:
        seconds = wait_seconds(before.count)
        print(f"mixtral-run: attempt {before.count + 1} in {seconds:.0f} s", flush=True)
        if attempt.stopped_within(seconds):
            return 128 + signal.SIGTERM
    Attempts(before.count + 1).write(folder)
    code = attempt.run([*program, *(["--resume", "auto"] if resumes and before.count else [])])
    if code in INCURABLE:
        print(f"mixtral-run: exit code {code}: the job is not started again, as that cannot help", flush=True)
        Attempts(before.count + 1, code).write(folder)
    return code


class _Attempt:
    """The program, and the signals for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stopped_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._signal is None and time.monotonic() < until:
            time.sleep(min(0.1, seconds))
        return self._signal is not None

    def run(self, words: Sequence[str]) -> int:
        self._process = subprocess.Popen(words)
        if self._signal is not None:
            self._process.send_signal(self._signal)
        code = self._process.wait()
        return code if code >= 0 else 128 - code


def main(words: Sequence[str]) -> int:
    """Run the program after FOLDER; with `--resumes` in front of it, it knows `--resume auto`."""
    folder, *program = words
    resumes = program[0] == "--resumes"
    return run(Path(folder), program[1:] if resumes else program, resumes=resumes)


if __name__ == "__main__":
    # The exit of the interpreter itself must not wait for anything.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)

"""Kill first bootstraps of a throw-away host, beside the other parts of the soak: they mostly wait for disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from mixtral_run.fleet.testhosts.engine import why_no_engine

Row = tuple[str, str, str]
ROOT = Path(__file__).parents[2]
WHAT = "first `bootstrap` of a host killed and run again"
SECONDS_TO_END = 300
"""Time for the point that is under way at the end: a host is installed, and bootstrapped three times."""


class Bootstraps:
    """`benchmarks.killed_bootstrap` in a process group of its own, which ends with the block."""

    def __init__(self, log: IO[bytes], count: int, seed: int, minutes: float) -> None:
        self._log = log
        self.reason = why_no_engine()
        words = ["--points", str(count), "--seed", str(seed), "--minutes", str(minutes)]
        argv = [sys.executable, "-m", "benchmarks.killed_bootstrap", *words]
        self._process = (
            None
            if self.reason
            else subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            # As Ctrl-C: the host is removed.
            os.killpg(self._process.pid, signal.SIGINT)
            self._process.wait()

    def rows(self) -> Iterator[tuple[Row, list[str]]]:
        """Wait for the end. Yield the row of the table, and what went wrong."""
        if self._process is None:
            yield (WHAT, "0 kills", f"not run: {self.reason}"), []
            return
        code = self._process.wait()
        self._log.seek(0)
        output = self._log.read().decode(errors="replace")
        lines = output.splitlines()
        yield outcome(code, lines[-1] if lines else "", output[-4000:])


def outcome(code: int, last_line: str, output: str) -> tuple[Row, list[str]]:
    """Return the row and the problems of a run of `benchmarks.killed_bootstrap` by its exit code and last line."""
    try:
        found = json.loads(last_line)
        kills, good, hosts = found["kills"], found["good"], len(found["points"])
    except (ValueError, KeyError, TypeError):
        return (WHAT, "0 kills", f"ended with exit code {code}"), [f"bootstrap: exit code {code}\n{output}"]
    problems = [] if code == 0 and good == hosts else [f"bootstrap: {good} of {hosts} hosts ended ready\n{output}"]
    return (WHAT, f"{kills} kills", f"{good} of {hosts} hosts ended ready, and a further run changed nothing"), problems

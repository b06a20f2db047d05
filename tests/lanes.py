"""Run the test suite in two lanes side by side: tests of hosts, which mostly wait for disks and packages, and the rest.

`python -m tests.lanes [PYTEST ARGUMENTS]`. Each lane is a pytest of its own, whose output goes to .cache/lanes/ and is
printed whole when the lane is done. The last line counts the tests of both. The exit code is 0 only if no lane failed.
Ctrl-C ends both lanes. `--unit` as the first argument runs the unit tests alone, in two halves.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from xml.etree import ElementTree

LANES = {"host": "host", "compute": "not host"}
"""The expression for `pytest -m` of each lane."""
FIRST_HALF = ("tests/unit/host", "tests/unit/train")
"""Folders of unit tests that take half of their time."""
FOLDER = Path(".cache/lanes")
POLL_SECONDS = 0.2
PROGRESS_SECONDS = 60
NO_TESTS = 5
"""Exit code of pytest if no test matches, which one lane may do."""


@dataclass(frozen=True)
class Counts:
    """Outcomes of tests. A test whose fixture raised an error counts as failed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass
class Lane:
    """One pytest, from its start to its printed log."""

    name: str
    words: Sequence[str]
    folder: Path
    seconds: float = 0.0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / f"{self.name}.log"
        self.results = self.folder / f"{self.name}.xml"
        self.results.unlink(missing_ok=True)
        self._began = time.monotonic()
        with self.log.open("wb") as output:
            # A group of its own: it hears of Ctrl-C once, from `interrupt`. A second time would cut pytest's cleanup.
            self.process = subprocess.Popen(
                [*self.words, f"--junit-xml={self.results}", "-o", f"cache_dir={self.folder / self.name}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def is_done(self) -> bool:
        """Return True once, and then for good, when the process has ended."""
        if self.process.poll() is None:
            return False
        self.seconds = self.seconds or time.monotonic() - self._began
        return True

    def interrupt(self) -> None:
        """Ask the lane to end, as Ctrl-C does: pytest takes its fixtures down and reports what it has."""
        self._send(signal.SIGINT)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def progress(self) -> str:
        """Return the last percentage in the log."""
        found = re.findall(r"\[ *(\d+%)\]", self.log.read_text(encoding="utf-8", errors="replace"))
        return f"{self.name} {found[-1] if found else '0%'}"

    def counts(self) -> Counts:
        """Return the outcomes. A lane that wrote none has failed in its own way, which counts as one."""
        if self.process.returncode == NO_TESTS:
            return Counts()
        try:
            return counts_of(self.results)
        except (FileNotFoundError, ElementTree.ParseError):
            return Counts(failed=1)


def counts_of(results: Path) -> Counts:
    """Return the outcomes in a JUnit file, as pytest writes it at the end."""
    # Written by our own process.
    suite = ElementTree.parse(results).getroot().find("testsuite")
    if suite is None:
        return Counts(failed=1)
    total, failures, errors, skipped = (int(suite.get(each, 0)) for each in ("tests", "failures", "errors", "skipped"))
    return Counts(total - failures - errors - skipped, failures + errors, skipped)


def exit_code(codes: Sequence[int]) -> int:
    """Return 0 if every lane passed, or one did and no test matches the others; else the first failing exit code."""
    if all(code == NO_TESTS for code in codes):
        return NO_TESTS
    return next((abs(code) for code in codes if code not in (0, NO_TESTS)), 0)


def run(lanes: Sequence[Lane]) -> int:
    """Wait for all lanes and print each one's log when it is done. Return the exit code of the whole."""
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        for lane in lanes:
            if asked:
                lane.kill()
            else:
                lane.interrupt()
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    began = spoke = time.monotonic()
    waiting = list(lanes)
    while waiting:
        time.sleep(POLL_SECONDS)
        for lane in [each for each in waiting if each.is_done()]:
            waiting.remove(lane)
            spoke = time.monotonic()
            print(f"\n===== {lane.name}: exit code {lane.process.returncode}, {lane.seconds:.0f} s =====", flush=True)
            sys.stdout.write(lane.log.read_text(encoding="utf-8", errors="replace"))
        if waiting and time.monotonic() - spoke > PROGRESS_SECONDS:
            spoke = time.monotonic()
            print(f"{spoke - began:.0f} s: {', '.join(lane.progress() for lane in waiting)}", flush=True)
    times = ", ".join(f"{lane.name} {lane.seconds:.0f} s" for lane in lanes)
    print(f"\nlanes: {times}")
    counts = sum((lane.counts() for lane in lanes), Counts())
    print(counts, flush=True)
    if asked:
        return 128 + asked[0]
    return exit_code([lane.process.returncode for lane in lanes]) or int(counts.failed > 0)


def main(words: Sequence[str]) -> int:
    """Run both lanes with these arguments of pytest; with --unit as the first, the unit tests in two halves."""
    if words[:1] == ["--unit"]:
        pytest = [sys.executable, "-m", "pytest", *words[1:]]
        others = ["tests/unit", *(f"--ignore={folder}" for folder in FIRST_HALF)]
        return run([Lane("unit-1", [*pytest, *FIRST_HALF], FOLDER), Lane("unit-2", [*pytest, *others], FOLDER)])
    pytest = [sys.executable, "-m", "pytest", *words]
    return run([Lane(name, [*pytest, "-m", chosen], FOLDER) for name, chosen in LANES.items()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

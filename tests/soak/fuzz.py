"""Feed damaged inputs to every reader: no traceback, no call over 5 seconds, bounded memory."""

from __future__ import annotations

import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

from tests.soak.targets import Target, all_targets

SECONDS = 5
MOST_GROWN_MIB = 300
"""Growth of the resident memory of one target that counts as a leak. First use loads libraries of about 200 MiB."""
PAGES_PER_MIB = 256


class TooSlowError(Exception):
    """A reader took more than SECONDS."""


@dataclass(frozen=True)
class Outcome:
    """Result of one target. failures: one line for each kind of error, with an input that causes it."""

    name: str
    num_inputs: int
    seconds: float
    grown_mib: int
    failures: tuple[str, ...]


def fuzz(num_inputs: int, seed: int = 0, deadline: float | None = None) -> list[Outcome]:
    """Try `num_inputs` inputs over all targets, the same for the same `seed`. Each target ends at its share of time.

    deadline: by time.monotonic(); None for no limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        targets = all_targets(Path(folder))
        outcomes = []
        for number, target in enumerate(targets):
            end = None
            if deadline is not None:
                end = time.monotonic() + (deadline - time.monotonic()) / (len(targets) - number)
            outcomes.append(fuzz_one(target, -(-num_inputs // len(targets)), seed, end))
        return outcomes


def fuzz_one(target: Target, count: int, seed: int, end: float | None = None) -> Outcome:
    """Try inputs of one target, at most `count`, until `end`."""
    failures: dict[str, str] = {}
    before, began = resident_mib(), time.monotonic()
    previous = signal.signal(signal.SIGALRM, _too_slow)
    number = 0
    try:
        for number in range(1, count + 1):
            data = target.damage(target.seeds, Random(f"{seed} {target.name} {number}"))
            signal.alarm(SECONDS)
            try:
                target.check(data)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}"[:200]
                failures.setdefault(kind.split(": ")[0], f"{kind}; input {number}: {data[:200]!r}")
            finally:
                signal.alarm(0)
            if end is not None and time.monotonic() > end:
                break
    finally:
        signal.signal(signal.SIGALRM, previous)
    grown = resident_mib() - before
    if grown > MOST_GROWN_MIB:
        failures["memory"] = f"memory grew by {grown} MiB"
    return Outcome(target.name, number, time.monotonic() - began, grown, tuple(failures.values()))


def resident_mib() -> int:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) // PAGES_PER_MIB


def _too_slow(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise TooSlowError(f"over {SECONDS} seconds")

"""How many workers copy, and how they write: as is told, or as the first seconds show to be worth it.

Too few leave the disk idle while they compute; too many get into each other's way. Which is which depends on disk and
cores, so numbers are tried one after another on the work itself. What is written does not depend on it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

WINDOW_SECONDS = 0.7
"""How long each number is tried. All of them together end before the first wait for the disk."""

GAIN = 1.05
"""More workers have to be faster by this much: the fewest that are about as fast as any are taken."""

MOST_WORKERS = 32


class Way(NamedTuple):
    """How many copy, and whether they write into mapped memory: see mmap_writer.py."""

    workers: int
    mapped: bool = False


class Pace:
    """Holds workers back above the number that is allowed now; counts the bytes that they copy.

    Worker numbers begin at 0. Call `step` from one thread, again and again, until `settled`; `chosen` is the best way
    known so far, `now` the one that is to be gone. mappable: whether mapped memory is worth a try.
    """

    def __init__(
        self, workers: int | None, clock: Callable[[], float] = time.monotonic, *, mappable: bool = False
    ) -> None:
        ways = [Way(number) for number in ([workers] if workers else candidates(num_cores()))]
        # One worker that maps has nobody to wait for.
        ways += [Way(each.workers, mapped=True) for each in ways if mappable and each.workers > 1]
        self.num_threads = max(each.workers for each in ways)
        self.now = self.chosen = ways[0]
        self._left = ways[1:]
        self._clock = clock
        self._condition = threading.Condition()
        self._copied = 0
        self._rates: dict[Way, float] = {}
        self._window: tuple[float, int] | None = None
        self.settled = not self._left

    def advance(self, num_bytes: int) -> None:
        """Count what was copied."""
        with self._condition:
            self._copied += num_bytes

    def wait_for_turn(self, worker: int, stopped: Callable[[], bool]) -> None:
        """Return when this worker may copy, or when all are to stop."""
        if worker < self.now.workers:
            return
        with self._condition:
            while worker >= self.now.workers and not stopped():
                self._condition.wait(0.2)

    def step(self) -> None:
        """Begin a window, or end one that has lasted long enough and go on to the next way or the best."""
        now = self._clock()
        if self.settled:
            return
        if self._window is None:
            self._window = (now, self._copied)
            return
        began, copied = self._window
        if now - began < WINDOW_SECONDS:
            return
        before = [rate for way, rate in self._rates.items() if way.mapped == self.now.mapped]
        self._rates[self.now] = rate = (self._copied - copied) / (now - began)
        if before and rate < before[-1] / GAIN:
            # Still more workers of this kind would be slower still.
            self._left = [way for way in self._left if way.mapped != self.now.mapped]
        if self._left:
            self._allow(self._left.pop(0))
            self._window = (now, self._copied)
            return
        self.settled = True
        best = max(self._rates.values())
        self.chosen = next(way for way, rate in self._rates.items() if rate * GAIN >= best)
        self._allow(self.chosen)

    def let_all_go(self) -> None:
        """No more jobs are to be had: those that were held back end theirs."""
        self.settled = True
        self._allow(self.now._replace(workers=self.num_threads))

    def _allow(self, way: Way) -> None:
        with self._condition:
            self.now = way
            self._condition.notify_all()


def candidates(cores: int) -> list[int]:
    """Numbers to try, rising. More than cores, as much of a worker's time is waiting for the disk."""
    most = max(8, min(MOST_WORKERS, 2 * cores))
    return [number for number in (4, 8, 16, 32) if number <= most]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Choose how many workers copy and how they write: as configured, or as measured in the first seconds.

Too few workers leave the disk idle while they compute; too many get into each other's way. The best number depends on
disk and cores, so candidates are tried one after another on the work itself. The result does not depend on it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

WINDOW_SECONDS = 0.7
"""Length of the trial of each candidate. All trials together end before the first wait for the disk."""

GAIN = 1.05
"""Speed-up that more workers must bring: of candidates that are about as fast, the fewest workers are chosen."""

MOST_WORKERS = 32


class Workers(NamedTuple):
    """The number of workers, and whether they write into mapped memory (mmap_writer.py)."""

    workers: int
    mapped: bool = False


class Pace:
    """Holds back workers above the number that is allowed at the moment, and counts the bytes that they copy.

    Worker numbers begin at 0. Call `step` repeatedly from one thread until `settled`. `chosen` is the best candidate so
    far, `now` the one in use. mappable: True if mapped memory is worth a trial.
    """

    def __init__(
        self, workers: int | None, clock: Callable[[], float] = time.monotonic, *, mappable: bool = False
    ) -> None:
        trials = [Workers(number) for number in ([workers] if workers else candidates(num_cores()))]
        # A single worker waits for nobody, so that mapping gains nothing.
        trials += [Workers(each.workers, mapped=True) for each in trials if mappable and each.workers > 1]
        self.num_threads = max(each.workers for each in trials)
        self.now = self.chosen = trials[0]
        self._left = trials[1:]
        self._clock = clock
        self._condition = threading.Condition()
        self._copied = 0
        self._rates: dict[Workers, float] = {}
        self._window: tuple[float, int] | None = None
        self.settled = not self._left

    def advance(self, num_bytes: int) -> None:
        """Count copied bytes."""
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
        """Begin a trial, or end one that has lasted long enough and continue with the next candidate or the best."""
        now = self._clock()
        if self.settled:
            return
        if self._window is None:
            self._window = (now, self._copied)
            return
        began, copied = self._window
        if now - began < WINDOW_SECONDS:
            return
        before = [rate for each, rate in self._rates.items() if each.mapped == self.now.mapped]
        self._rates[self.now] = rate = (self._copied - copied) / (now - began)
        if before and rate < before[-1] / GAIN:
            # Even more workers of this kind would be slower still.
            self._left = [each for each in self._left if each.mapped != self.now.mapped]
        if self._left:
            self._allow(self._left.pop(0))
            self._window = (now, self._copied)
            return
        self.settled = True
        best = max(self._rates.values())
        self.chosen = next(each for each, rate in self._rates.items() if rate * GAIN >= best)
        self._allow(self.chosen)

    def let_all_go(self) -> None:
        """Release all workers: there are no more jobs, and those that were held back finish theirs."""
        self.settled = True
        self._allow(self.now._replace(workers=self.num_threads))

    def _allow(self, workers: Workers) -> None:
        with self._condition:
            self.now = workers
            self._condition.notify_all()


def candidates(cores: int) -> list[int]:
    """Return the numbers of workers to try, rising; more than cores, since workers mostly wait for the disk."""
    most = max(8, min(MOST_WORKERS, 2 * cores))
    return [number for number in (4, 8, 16, 32) if number <= most]


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

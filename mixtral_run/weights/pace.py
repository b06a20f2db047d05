"""How many workers copy: as many as are told, or as many as the first seconds show to be worth it.

Too few leave the disk idle while they compute; too many get into each other's way. Which is which depends on disk and
cores, so numbers are tried one after another on the work itself. What is written does not depend on it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

WINDOW_SECONDS = 0.7
"""How long each number is tried. All of them together end before the first wait for the disk."""

GAIN = 1.05
"""More workers have to be faster by this much: the fewest that are about as fast as any are taken."""

MOST_WORKERS = 32


class Pace:
    """Holds workers back above the number that is allowed now; counts the bytes that they copy.

    Worker numbers begin at 0. Call `step` from one thread, again and again, until `settled`; `chosen` is the best
    number known so far.
    """

    def __init__(self, workers: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._candidates = [workers] if workers else candidates(num_cores())
        self.num_threads = max(self._candidates)
        self.allowed = self.chosen = self._candidates[0]
        self._clock = clock
        self._condition = threading.Condition()
        self._copied = 0
        self._rates: list[float] = []
        self._window: tuple[float, int] | None = None
        self.settled = len(self._candidates) == 1

    def advance(self, num_bytes: int) -> None:
        """Count what was copied."""
        with self._condition:
            self._copied += num_bytes

    def wait_for_turn(self, worker: int, stopped: Callable[[], bool]) -> None:
        """Return when this worker may copy, or when all are to stop."""
        if worker < self.allowed:
            return
        with self._condition:
            while worker >= self.allowed and not stopped():
                self._condition.wait(0.2)

    def step(self) -> None:
        """Begin a window, or end one that has lasted long enough and go on to the next number or the best."""
        now = self._clock()
        if self.settled:
            return
        if self._window is None:
            self._window = (now, self._copied)
            return
        began, copied = self._window
        if now - began < WINDOW_SECONDS:
            return
        self._rates.append((self._copied - copied) / (now - began))
        tried = len(self._rates)
        worse = tried > 1 and self._rates[-1] < self._rates[-2] / GAIN
        if tried < len(self._candidates) and not worse:
            self._allow(self._candidates[tried])
            self._window = (now, self._copied)
            return
        self.settled = True
        best = max(self._rates)
        self.chosen = next(n for n, rate in zip(self._candidates, self._rates, strict=False) if rate * GAIN >= best)
        self._allow(self.chosen)

    def let_all_go(self) -> None:
        """No more jobs are to be had: those that were held back end theirs."""
        self.settled = True
        self._allow(self.num_threads)

    def _allow(self, workers: int) -> None:
        with self._condition:
            self.allowed = workers
            self._condition.notify_all()


def candidates(cores: int) -> list[int]:
    """Numbers to try, rising. More than cores, as much of a worker's time is waiting for the disk."""
    most = max(8, min(MOST_WORKERS, 2 * cores))
    return [number for number in (4, 8, 16, 32) if number <= most]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

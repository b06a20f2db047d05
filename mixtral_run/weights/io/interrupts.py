"""Ctrl-C and SIGTERM while a folder is being written: the first ends the work in good order, Ctrl-C again at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME_SECONDS = 0.3
"""Signals this close are one: `timeout` sends each twice, to the process and to its group; under torchrun a terminal's
Ctrl-C comes from both. Nobody presses twice as fast and has read what the first press brought."""


class Interrupts:
    """Whether the work was asked to end. A signal raises KeyboardInterrupt, but within `held`."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._tell: Callable[[], None] | None = None

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    @property
    def seconds(self) -> float:
        """How long ago the work was asked to end; 0 where it was not."""
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    @contextmanager
    def held(self, tell: Callable[[], None]) -> Iterator[None]:
        """Within, the first signal is noted and `tell` is called, no more; KeyboardInterrupt is raised at the end.

        The main thread should only wait there for others, which ask whether they were `asked`: it is the one that hears
        signals, and only between two steps of its own, and `tell` must not get into anything that is under way.
        """
        self._tell = tell
        try:
            yield
        finally:
            self._tell = None
        if self.asked:
            raise KeyboardInterrupt

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal."""
        del frame
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            if self._tell is None:
                raise KeyboardInterrupt
            self._tell()
        elif number == signal.SIGINT and self.seconds > SAME_SECONDS:
            # As if nothing had ever listened: no clean-up that could take its time.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Listen while the block runs. A signal that is ignored stays so, as Ctrl-C in a shell's background jobs."""
    mesh = Interrupts()
    # Python lets only the main thread listen; None is a handler that is not Python's.
    found = {number: signal.getsignal(number) for number in SIGNALS}
    kept = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    if threading.current_thread() is not threading.main_thread():
        kept = {}
    for number in kept:
        signal.signal(number, mesh.hear)
    try:
        yield mesh
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)

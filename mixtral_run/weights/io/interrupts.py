"""Handle Ctrl-C and SIGTERM while a folder is written: the first ends the work in order, a second Ctrl-C at once."""

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
"""Signals this close count as one: `timeout` sends each twice, to the process and to its group, and under torchrun a
terminal's Ctrl-C comes from both. Nobody presses twice as fast after reading what the first press printed."""


class Interrupts:
    """Record of requests to end the work. A signal raises KeyboardInterrupt, except within `held`."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._on_request: Callable[[], None] | None = None

    @property
    def asked(self) -> bool:
        """Return True once the work was asked to end."""
        return self._asked_at is not None

    @property
    def seconds(self) -> float:
        """Return the seconds since the work was asked to end, 0 if it was not."""
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    @contextmanager
    def held(self, on_request: Callable[[], None]) -> Iterator[None]:
        """Delay the first signal: within the block it only calls `on_request`; KeyboardInterrupt is raised at the end.

        The main thread should only wait within the block, for other threads that check `asked`: Python runs signal
        handlers in the main thread, between two of its steps, so `on_request` must not interfere with work in progress.
        """
        self._on_request = on_request
        try:
            yield
        finally:
            self._on_request = None
        if self.asked:
            raise KeyboardInterrupt

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        del frame
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            if self._on_request is None:
                raise KeyboardInterrupt
            self._on_request()
        elif number == signal.SIGINT and self.seconds > SAME_SECONDS:
            # The default action: no clean-up that could take time.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle signals while the block runs. An ignored signal stays ignored, as Ctrl-C in a shell's background jobs."""
    requests = Interrupts()
    # Python lets only the main thread listen; None is a handler that is not Python's.
    found = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    for number in handlers:
        signal.signal(number, requests.hear)
    try:
        yield requests
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

"""Imports at the start of a command, during which Ctrl-C ends the process at once.

An import that KeyboardInterrupt cuts off leaves modules half loaded: libraries swallow the exception, or a later import
fails for another reason. Nothing has been written yet, so that the process may end without cleaning up.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


@contextmanager
def importing() -> Iterator[None]:
    """End the process with exit code 130 on SIGINT while the block runs.

    Do nothing where SIGINT is ignored or has another handler.
    """
    try:
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_default:
            signal.signal(signal.SIGINT, _leave)
    except ValueError:  # only the main thread may set handlers
        is_default = False
    yield
    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)

"""Imports at the start of a command, during which Ctrl-C ends the process at once.

An import that KeyboardInterrupt cuts off leaves modules half loaded: libraries swallow the exception, or a later import
fails for another reason. Nothing has been written yet, so that the process may end without cleaning up.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mixtral_run.launch.process_exit import INTERRUPTED, INTERRUPTED_WORD
from mixtral_run.launch.torchrun_errors import print_once


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
    printed = False
    # The signal may have cut off a write to the same stream, which Python then refuses to write to.
    with suppress(RuntimeError):
        printed = print_once(INTERRUPTED_WORD)
    if not printed:
        os.write(2, f"{INTERRUPTED_WORD}\n".encode())
    os._exit(INTERRUPTED)

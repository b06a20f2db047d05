"""Standard streams of a process that was started without them, as by `>&-` in a shell."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Open the null device in place of each standard stream that is closed. Call it before files are opened.

    The next file or socket would get the number of the closed stream, and child processes would take it for theirs.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: PTH123, SIM115

"""Write ranges of files."""

from __future__ import annotations

import os


def write_whole(descriptor: int, position: int, data: bytes | memoryview) -> None:
    """Write all of `data` at a position of the file. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)

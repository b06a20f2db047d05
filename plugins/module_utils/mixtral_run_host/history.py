"""The history of a host: a bounded log of who changed what and when, one JSON object a line, for everyone to read.

It is a log, in the folder of logs: `state: absent` and the teardown, which take back what the kit changed, leave it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from .files import replace_in
from .folders import naming, open_folder

HISTORY = "/var/log/mixtral-run/history.jsonl"
MAX_LINE_BYTES = 8192
MAX_BYTES, KEPT_BYTES = 1 << 18, 1 << 17
"""A longer history loses its oldest lines, down to KEPT_BYTES."""


def append(line, path=HISTORY):
    """Append a line to the history. Raise OSError if it cannot be written, or if another than a file is there."""
    data = line.encode() + b"\n"
    if b"\n" in data[:-1] or len(data) > MAX_LINE_BYTES:
        raise OSError(errno.EMSGSIZE, "a line is too long, or more than one", path)
    folder = open_folder(os.path.dirname(path), make=True, mode=0o755)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with naming(path):
            _append(folder, os.path.basename(path), data)
    finally:
        os.close(folder)


def _append(folder, name, data):
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o644, dir_fd=folder), "r+b", buffering=0) as file:
        now = os.fstat(file.fileno())
        if not stat.S_ISREG(now.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        os.fchmod(file.fileno(), 0o644)  # whatever umask the first writer had
        # A line that a crash cut off must not spoil the next one.
        begun = now.st_size and os.pread(file.fileno(), 1, now.st_size - 1) != b"\n"
        file.write((b"\n" if begun else b"") + data)
        os.fsync(file.fileno())
        if now.st_size + len(data) <= MAX_BYTES:
            return
        file.seek(-KEPT_BYTES, os.SEEK_END)
        newest = file.read().partition(b"\n")[2]
    replace_in(folder, name, newest.decode(errors="replace"))

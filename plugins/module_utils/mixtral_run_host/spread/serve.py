"""Serve the files of one folder over SSH. The temporary key of another host may run only this program.

SSH_ORIGINAL_COMMAND is `get HASH START`: the bytes of that file from START on; or `probe`: nothing, if the folder can be
read. The other host learns names and hashes
from its operator and never from this program.

The module spread_source writes this file to the host that serves, so it imports only the standard library. The folder
and the rate are written into it: on the line of authorized_keys, a shell and sshd would take some letters as their own.
"""

from __future__ import annotations

import os
import re
import sys
import time

CHUNK = 1 << 20
SERVED = ("", 0)
"""Folder of files that are named by their hash, and bytes per second; 0 is no limit."""


def get_file(path, start, rate):
    """Write the bytes of a file from `start` on to standard output."""
    began, sent = time.monotonic(), 0
    # A link would lead out of the folder.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        file.seek(start)
        for chunk in iter(lambda: file.read(min(CHUNK, max(rate // 4, 1)) if rate else CHUNK), b""):
            sys.stdout.buffer.write(chunk)
            sent += len(chunk)
            if rate:
                time.sleep(max(0.0, began + sent / rate - time.monotonic()))
    sys.stdout.buffer.flush()


def main(folder, rate, command):
    """Return None on success, or the error message."""
    asked = re.match(r"get ([0-9a-f]{40}|[0-9a-f]{64}) ([0-9]{1,18})\Z", command)
    if asked is None and command != "probe":
        return "only get HASH START is served"
    try:
        if asked is None:
            return os.scandir(folder).close()
        return get_file(os.path.join(folder, asked.group(1)), int(asked.group(2)), rate)
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main(*SERVED, os.environ.get("SSH_ORIGINAL_COMMAND", "")))

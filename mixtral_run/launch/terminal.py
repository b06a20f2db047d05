"""Standard input and Ctrl-C for one process of a job: `chat` reads a terminal that belongs to the process above it.

The processes of a job are forked from a server without standard input, and Ctrl-C ends a job. `lend_terminal` in the
process that starts the job, and `borrow_terminal` in the one that reads, change both. Linux only.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import threading

OWNER_VARIABLE = "MIXTRAL_RUN_TERMINAL"
"""Environment variable of a job: process and descriptor of the standard input that it may read."""


def is_lent() -> bool:
    """Return True if this process has lent its terminal to the job that it starts."""
    return OWNER_VARIABLE in os.environ


def lend_terminal() -> None:
    """Let a process of the job that is started next read the standard input, and have Ctrl-C once it reads.

    Until then Ctrl-C ends the job, which loads its model.
    """
    descriptor = 0
    if stat.S_ISSOCK(os.fstat(0).st_mode):
        # Another process cannot open a socket by its name in /proc.
        descriptor, end = os.pipe()
        source, sink = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(end, "wb", buffering=0)

        def forward() -> None:
            with sink:
                shutil.copyfileobj(source, sink)

        threading.Thread(target=forward, name="standard input", daemon=True).start()
    os.environ[OWNER_VARIABLE] = f"{os.getpid()}:{descriptor}"
    signal.signal(signal.SIGUSR1, lambda *_: signal.signal(signal.SIGINT, signal.SIG_IGN))


def borrow_terminal() -> None:
    """Make the lent standard input the one of this process. Do nothing if none was lent: then it has its own."""
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is None:
        return
    pid, _, descriptor = owner.partition(":")
    opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY)
    # readline edits lines only at descriptor 0.
    os.dup2(opened, 0)
    os.close(opened)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - a descriptor
    os.kill(int(pid), signal.SIGUSR1)

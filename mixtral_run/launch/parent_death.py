"""End a process when its parent has died, whatever ended the parent: after SIGKILL a parent can tell nobody.

The kernel does so for the processes that this kit forks (`end_with_parent`). Where another program started the process,
its parent may have been a thread that ended long ago, which the kernel takes for the parent's death: there a thread
compares the parent's id (`watch_parent`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

FORK_SERVER_PARENT = "MIXTRAL_RUN_PARENT"
"""Environment variable of the fork server: the id of the process that started it."""
JOB_PARENT = "MIXTRAL_RUN_FORK_SERVER"
"""Environment variable of a job's processes: the id of the fork server."""
SECONDS = 1.0
"""Interval at which `watch_parent` looks."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(variable: str) -> None:
    """Let the kernel kill this process when its parent dies. Do nothing without the variable.

    variable: the environment variable that has the parent's id. A parent that died before this call is noticed by it.
    """
    parent = os.environ.get(variable)
    if parent is None:
        return
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is None or prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        watch_parent()
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def watch_parent() -> None:
    """Start a thread that kills this process once its parent has died."""
    parent = os.getppid()

    def watch() -> None:
        while not never.wait(SECONDS):
            if os.getppid() != parent:
                with contextlib.suppress(OSError):
                    print(f"Process {parent} has died, which started this one; it ends.", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    never = threading.Event()
    threading.Thread(target=watch, name="parent", daemon=True).start()

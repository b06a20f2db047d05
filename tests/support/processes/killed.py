"""A command of the kit that is killed at a moment, as when a laptop loses its power."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def killed_after(seconds: float, argv: Sequence[str], folder: Path, environment: Mapping[str, str]) -> bool:
    """Run a command and kill it and all that it started after `seconds`. Return False if it ended before.

    What runs on the host is not killed: it goes on for as long as it does when a connection is lost.
    """
    with subprocess.Popen(
        argv, cwd=folder, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return False
        for session in _sessions(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
    return True


def killed_at(text: str, argv: Sequence[str], folder: Path, environment: Mapping[str, str]) -> bool:
    """Run a command and kill it and all that it started once it prints `text`. Return False if it ended before."""
    environment = {**environment, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        argv, cwd=folder, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        if not any(text in line for line in process.stdout):
            return False
        for session in _sessions(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
    return True


def _sessions(leader: int) -> set[int]:
    """Return the process groups of a process and of all its descendants. Ansible runs in a session of its own."""
    import psutil

    try:
        family = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
    except psutil.NoSuchProcess:
        return {leader}
    found = set()
    for process in family:
        with contextlib.suppress(ProcessLookupError):
            found.add(os.getpgid(process.pid))
    return found - {os.getpgid(0)}

"""The one place of this package that starts processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import IO, Any


class TargetError(RuntimeError):
    """A command that the test hosts need has failed; the message carries the command and what it printed."""


def call(*argv: str | Path, stdin: IO[bytes] | None = None, check: bool = True, **more: Any) -> str:
    """Run a command and return what it printed. Raises TargetError with its output where it fails."""
    words = [str(word) for word in argv]
    # A debconf dialogue would wait for ever.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(words, stdin=stdin, capture_output=True, env=environment, check=False, **more)
    output: str = done.stdout.decode(errors="replace")
    if check and done.returncode:
        raise TargetError(
            f"{' '.join(words)}\nexit code {done.returncode}\n{output}{done.stderr.decode(errors='replace')}"
        )
    return output


def succeeds(*argv: str | Path) -> bool:
    """Whether a command exits with 0; its output is dropped. A missing program counts as no."""
    try:
        return subprocess.run([str(word) for word in argv], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def start_in_background(log: Path, *argv: str | Path) -> int:
    """Start a process that outlives this one; returns its id."""
    with log.open("ab") as stream:
        process = subprocess.Popen([str(word) for word in argv], stdout=stream, stderr=stream, start_new_session=True)
    return process.pid


def pipe(producer: list[str], consumer: list[str]) -> str:
    """Run `producer | consumer` without a shell; returns what the consumer printed."""
    source = subprocess.Popen(producer, stdout=subprocess.PIPE)
    try:
        return call(*consumer, stdin=source.stdout)
    finally:
        if source.stdout:
            source.stdout.close()
        source.wait()

"""Start of local processes for the throw-away hosts. No other module of this package starts processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import IO, Any


class TargetError(RuntimeError):
    """A failed command of the throw-away hosts. The message holds the command and its output."""


def call(*argv: str | Path, stdin: IO[bytes] | None = None, check: bool = True, **more: Any) -> str:
    """Run a command and return its standard output.

    Raises:
        TargetError: the command is not installed; or, with `check`, it failed. The message holds its output.
    """
    words = [str(word) for word in argv]
    # A debconf dialogue would wait for input without end.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(words, stdin=stdin, capture_output=True, env=environment, check=False, **more)
    except FileNotFoundError as error:
        raise TargetError(f"{words[0]} is not installed here") from error
    output: str = done.stdout.decode(errors="replace")
    if check and done.returncode:
        raise TargetError(
            f"{' '.join(words)}\nexit code {done.returncode}\n{output}{done.stderr.decode(errors='replace')}"
        )
    return output


def succeeds(*argv: str | Path) -> bool:
    """Return True if a command exits with code 0. Its output is discarded; a missing program gives False."""
    try:
        return subprocess.run([str(word) for word in argv], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def start_in_background(log: Path, *argv: str | Path) -> int:
    """Start a process that outlives this one and return its process id. Both outputs are appended to `log`."""
    with log.open("ab") as stream:
        process = subprocess.Popen([str(word) for word in argv], stdout=stream, stderr=stream, start_new_session=True)
    return process.pid


def pipe(producer: list[str], consumer: list[str]) -> str:
    """Run `producer | consumer` without a shell and return the consumer's standard output."""
    source = subprocess.Popen(producer, stdout=subprocess.PIPE)
    try:
        return call(*consumer, stdin=source.stdout)
    finally:
        if source.stdout:
            source.stdout.close()
        source.wait()

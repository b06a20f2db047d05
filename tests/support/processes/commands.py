"""Start commands that a test watches, signals or has started by another program, from the warm server (warm.py).

`start` is `subprocess.Popen` of a Python program. `forked_python` is a program that takes the place of Python's where a
scheduler or torchrun starts the interpreter.
"""

from __future__ import annotations

import select
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import warm

FORKED_PYTHON = Path(__file__).with_name("forked_python.py")


class ForkedCommand(subprocess.Popen[str]):
    """`subprocess.Popen` of a fork of the warm server. `pid` is the command's own; the command is not a child.

    Only how a process is started and waited for is replaced; streams and timeouts are those of the base class.
    """

    _process: warm.WarmProcess | None = None

    def _execute_child(self, args: Sequence[str], *more: Any) -> None:
        _, _, _, _, cwd, env, _, _, _, *streams = more[:15]
        new_session, group = more[-2:]
        server = warm.server_for(env)
        assert server is not None and not new_session
        try:
            out, err = streams[3], streams[5]
            self._process = warm.WarmProcess(
                server, args[1:], env, 1 if out == -1 else out, 2 if err == -1 else err, cwd=cwd, group=group == 0
            )
        finally:
            self._close_pipe_fds(*streams)  # type: ignore[attr-defined]
        self._child_created = True
        self.pid = self._process.pid

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._ended(0)

    def _wait(self, timeout: float | None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and self._process is not None:
            if not select.select([self._process], [], [], seconds)[0]:
                return None
            self.returncode = self._process.wait()
        return self.returncode


def start(argv: Sequence[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start Python with the arguments `argv`. `env` is its complete environment; the options are those of Popen."""
    kind = ForkedCommand if warm.can_fork(env) else subprocess.Popen
    return kind([sys.executable, *argv], env=env, text=True, **options)


def forked_python(folder: Path) -> str:
    """Write a program into `folder` that takes Python's arguments and runs them in a fork. Return its path.

    Signals reach the fork, and it dies with the program. Where no fork is possible, return the path of Python itself.
    """
    server = warm.server_for(warm.ENVIRONMENT)
    if server is None:
        return sys.executable
    server.connect().close()
    program = folder / "python"
    words = shlex.join([sys.executable, "-I", "-S", str(FORKED_PYTHON), server.path])
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return str(program)

"""End a process with a message and an exit code that later signals cannot change."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from typing import NoReturn

from mixtral_run.launch.torchrun_errors import print_once

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C ended."""
INTERRUPTED_WORD = "Interrupted."


def exit_with(message: str, exit_code: int) -> NoReturn:
    """Print `message` to stderr, once for all processes of a torchrun on this host, and end the process.

    Without a folder of torchrun's, each process of a job prints it, with its rank. Further SIGINT and SIGTERM change
    neither the exit code nor the output.
    """
    _ignore_signals(exit_code)
    if print_once(message):
        sys.exit(exit_code)
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank is not None else ""
    print(prefix + message, file=sys.stderr, flush=True)
    sys.exit(exit_code)


def exit_silently(exit_code: int) -> NoReturn:
    """End the process as `exit_with` does, without a message: another process reports the end."""
    _ignore_signals(exit_code)
    sys.exit(exit_code)


def end_at_once(code: object) -> None:
    """End the process as the interpreter does after `sys.exit(code)`, without taking its modules apart.

    That would take a second after torch was imported. Threads are waited for, functions of `atexit` are called and the
    output is flushed as always. Return, so that the interpreter does the rest, if the output cannot be flushed or
    `code` is a message. Only for a process that holds no unwritten files.
    """
    if code is not None and not isinstance(code, int):
        return
    try:
        # As multiprocessing ends its processes.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    except KeyboardInterrupt:
        pass  # The work is done, and its exit code known.
    os._exit((code or 0) & 0xFF)


def _ignore_signals(exit_code: int) -> None:
    """Make SIGINT and SIGTERM end the process with `exit_code`, and ignore them once the interpreter shuts down."""

    def install(ignored: bool) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if ignored else lambda *_: os._exit(exit_code))

    install(ignored=False)
    # The interpreter waits for its threads first, and a signal then ends the process. After that it drops Python
    # handlers, but not SIG_IGN.
    atexit.register(install, ignored=True)

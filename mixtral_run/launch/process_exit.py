"""End a process with a message and an exit code that later signals cannot change."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from mixtral_run.launch.torchrun_errors import print_once

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C ended."""
INTERRUPTED_WORD = "Interrupted."
PATIENCE_SECONDS = 2.0
"""Time after a first stop signal in which further ones are taken for the same key press."""


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


class StopOnce:
    """Handler of the signals that stop a job's parent: the first one raises torchrun's SignalException.

    Signals that follow while the processes stop are ignored: a second exception would break torchrun's own cleanup. A
    SIGINT more than PATIENCE_SECONDS after the first signal kills the processes of the job.
    """

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]

        del frame
        now = time.monotonic()
        if self._first is None:
            self._first = now
            name = signal.Signals(signum)
            raise SignalException(f"Process {os.getpid()} got signal: {name}", sigval=name)
        if signum == signal.SIGINT and now - self._first > PATIENCE_SECONDS:
            for child in multiprocessing.active_children():
                child.kill()  # torchrun then stops waiting for them, and cleans up as always

    @contextlib.contextmanager
    def installed(self, numbers: Sequence[signal.Signals]) -> Iterator[None]:
        """Handle the signals in the block, in place of torchrun's handler; after it too, once one of them has come."""
        from torch.distributed.elastic.multiprocessing import api

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        theirs = api._terminate_process_handler
        before = {number: signal.signal(number, self) for number in numbers}
        api._terminate_process_handler = self  # torchrun installs it again for each group of processes
        try:
            yield
        finally:
            api._terminate_process_handler = theirs
            if self._first is None:
                for number, handler in before.items():
                    signal.signal(number, handler)


def end_at_once(code: object, program: FrameType) -> None:
    """End the process as the interpreter does after `sys.exit(code)`, without taking its modules apart.

    That would take a second after torch was imported. Threads are waited for, functions of `atexit` are called and the
    output is flushed as always. Return, so that the interpreter does the rest, if the output cannot be flushed, if
    `code` is a message, or if a profiler or another program waits for the end. Only for a process that holds no
    unwritten files.

    program: the frame of the module that is the program.
    """
    if not isinstance(code, int | None) or _is_observed(program):
        return
    exit_code = (code or 0) & 0xFF
    try:
        with contextlib.suppress(KeyboardInterrupt):  # The work is done, and its exit code known.
            # As multiprocessing ends its processes.
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except KeyboardInterrupt:
        # Output may be lost, which is no success.
        exit_code = exit_code or INTERRUPTED
    except Exception:
        return
    os._exit(exit_code)


def _is_observed(program: FrameType) -> bool:
    """Return True if a profiler or tracer is active, or if other code than the interpreter called the program."""
    if sys.getprofile() is not None or sys.gettrace() is not None:
        return True
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12, for up to six tools
    if monitoring is not None and any(monitoring.get_tool(number) for number in range(6)):
        return True
    caller = program.f_back
    while caller is not None:
        # `python -m` calls the program through this module.
        if caller.f_globals.get("__name__") != "runpy":
            return True
        caller = caller.f_back
    return False


def _ignore_signals(exit_code: int) -> None:
    """Make SIGINT and SIGTERM end the process with `exit_code`, and ignore them once the interpreter shuts down."""

    def install(ignored: bool) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if ignored else lambda *_: os._exit(exit_code))

    install(ignored=False)
    # The interpreter waits for its threads first, and a signal then ends the process. After that it drops Python
    # handlers, but not SIG_IGN.
    atexit.register(install, ignored=True)

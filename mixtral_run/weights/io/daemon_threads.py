"""Work in threads that cannot keep the process from ending."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

SWITCH_SECONDS = 2e-4
"""Time that a thread may keep the interpreter from others while a call runs beside. By default it is 5 ms, and the main
thread, which gives the interpreter away in every operation of torch, would wait that long for each."""
_beside: list[float] = []
_beside_lock = threading.Lock()


class Beside(Generic[ResultT]):
    """A call that runs in a thread from now on, beside what this thread does. `result` waits for it."""

    def __init__(self, call: Callable[[], ResultT], name: str) -> None:
        self._call: Callable[[], ResultT] | None = call
        self._name = name
        self._results: list[ResultT] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def result(self) -> ResultT:
        """Wait for the end of the call, and return what it returned or raise what it raised.

        What would end a process, such as SystemExit, ends only the thread: it is raised as a RuntimeError.
        """
        self._thread.join()
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is not None:
            kind = type(self._error).__name__
            raise RuntimeError(f"The thread '{self._name}' ended with {kind}: {self._error}") from self._error
        return self._results[0]

    def wait(self, seconds: float) -> None:
        """Return when the call has ended, or after so many seconds."""
        self._thread.join(seconds)

    @property
    def is_running(self) -> bool:
        """Return True until the call has ended."""
        return self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Return True if the call has raised."""
        return self._error is not None

    def _run(self) -> None:
        _share_interpreter(more=True)
        try:
            assert self._call is not None
            self._results.append(self._call())
        except BaseException as error:
            self._error = error
        finally:
            # What the call refers to may be large.
            self._call = None
            _share_interpreter(more=False)


def _share_interpreter(*, more: bool) -> None:
    """Shorten the turns of threads from the begin of the first call that runs beside to the end of the last one."""
    with _beside_lock:
        if more:
            _beside.append(sys.getswitchinterval())
            sys.setswitchinterval(min(SWITCH_SECONDS, _beside[0]))
        else:
            before = _beside[0] if len(_beside) == 1 else SWITCH_SECONDS
            _beside.pop()
            sys.setswitchinterval(before)


def map_in_daemons(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], threads: int, name: str
) -> list[ResultT]:
    """Return the result of each item, computed in at most `threads` threads; raise the first error of them.

    All threads have ended when this function returns or raises. The interpreter joins the threads of a
    ThreadPoolExecutor before a process ends, so one that waits for a disk would keep the process; it joins no daemons.
    """
    results: dict[int, ResultT] = {}
    errors: list[BaseException] = []
    remaining = iter(enumerate(items))
    stop, lock = threading.Event(), threading.Lock()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    following = next(remaining, None)
                if following is None:
                    return
                index, item = following
                results[index] = function(item)
        except BaseException as error:
            errors.append(error)
            stop.set()

    workers = [
        threading.Thread(target=work, name=f"{name}_{number}", daemon=True)
        for number in range(min(threads, len(items)))
    ]
    started = []
    try:
        for each in workers:
            each.start()
            started.append(each)
        for each in started:
            each.join()
    finally:
        # Also on Ctrl-C, or if a thread cannot be started: the caller may close what the threads use.
        stop.set()
        for each in started:
            each.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]

"""Work in several threads that cannot keep the process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


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

"""Work in several daemon threads: results in order, the first error, and an end of the process without them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from mixtral_run.weights.io.daemon_threads import SWITCH_SECONDS, Beside, map_in_daemons

STUCK = """
import sys, threading, time
from mixtral_run.weights.io.daemon_threads import map_in_daemons
begun = threading.Event()
def wait(_):
    begun.set()
    time.sleep(60)
threading.Thread(target=map_in_daemons, args=(wait, [1, 2, 3], 2, "wait"), daemon=True).start()
begun.wait()
sys.exit(6)
"""


def test_results_come_in_order_from_as_many_threads_as_asked_for() -> None:
    together = threading.Barrier(3)

    def square(number: int) -> tuple[int, str]:
        if number < 3:
            together.wait(30)
        return number * number, threading.current_thread().name.rpartition("_")[0]

    assert map_in_daemons(square, range(40), 3, "square") == [(each * each, "square") for each in range(40)]
    assert map_in_daemons(square, [], 3, "square") == []


def test_the_first_error_ends_what_has_not_begun_and_is_raised_after_all_threads() -> None:
    calls: list[int] = []
    failed = threading.Event()

    def work(number: int) -> None:
        calls.append(number)
        if number == 0:
            failed.set()
            raise ValueError("the first")
        failed.wait(30)
        time.sleep(0.1)
        calls.append(-number)

    with pytest.raises(ValueError, match="the first"):
        map_in_daemons(work, range(100), 2, "failing")
    assert sorted(calls) in ([-1, 0, 1], [0])


def test_a_call_that_never_returns_does_not_keep_the_process() -> None:
    assert subprocess.run([sys.executable, "-c", STUCK], timeout=30, check=False).returncode == 6


def test_a_call_beside_gives_its_result_or_its_error_and_turns_are_short_only_meanwhile() -> None:
    before = sys.getswitchinterval()
    assert before > SWITCH_SECONDS
    gates = [threading.Event(), threading.Event()]

    def wait(number: int) -> int:
        gates[number].wait(30)
        if number:
            raise OSError("the second one fails")
        return 7

    first, second = Beside(lambda: wait(0), "first"), Beside(lambda: wait(1), "second")
    while sum(each.name in ("first", "second") for each in threading.enumerate()) < 2:
        time.sleep(0.001)
    deadline = time.monotonic() + 30
    while sys.getswitchinterval() != pytest.approx(SWITCH_SECONDS) and time.monotonic() < deadline:
        time.sleep(0.001)
    gates[0].set()
    assert first.result() == 7
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    gates[1].set()
    with pytest.raises(OSError, match="the second one fails"):
        second.result()
    assert sys.getswitchinterval() == pytest.approx(before)


def test_what_would_end_the_process_ends_only_the_thread_beside() -> None:
    beside = Beside(lambda: sys.exit("a library gives up"), "leaving")
    with pytest.raises(RuntimeError, match="'leaving' ended with SystemExit: a library gives up"):
        beside.result()
    assert beside.has_failed and not beside.is_running


def test_the_wait_for_a_call_beside_has_a_limit() -> None:
    gate = threading.Event()
    beside = Beside(lambda: gate.wait(30), "waiting")
    beside.wait(0.01)
    assert beside.is_running and not beside.has_failed
    gate.set()
    beside.wait(30)
    assert not beside.is_running and beside.result()

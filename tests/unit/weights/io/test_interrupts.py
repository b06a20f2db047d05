"""Signals while a folder is written: delayed, reported once, and restored afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from mixtral_run.weights.io import interrupts as module
from mixtral_run.weights.io.interrupts import SIGNALS, interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_keyboard_interrupt(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupts():
        send(number)
        signal.sigtimedwait([], 5)
    assert signal.getsignal(number) == before


def test_a_delayed_signal_is_noted_and_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # However long this process has to wait: the same request.
    monkeypatch.setattr(module, "SAME_SECONDS", 1e6)
    reported: list[bool] = []
    reached = False
    with (
        pytest.raises(KeyboardInterrupt),
        interrupts() as signals,
        signals.held(lambda: reported.append(signals.asked)),
    ):
        assert not signals.asked and signals.seconds == 0
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            send(number)
        reached = True
    assert reached and reported == [True]
    assert signals.seconds > 0


def test_an_error_meanwhile_is_raised_in_place_of_the_interrupt() -> None:
    def fail() -> None:
        with interrupts() as signals, signals.held(lambda: None):
            send(signal.SIGTERM)
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="full"):
        fail()


def test_what_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts() as signals:
        send(signal.SIGINT)
        assert not signals.asked
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_another_thread_cannot_listen_and_works_all_the_same() -> None:
    worked: list[bool] = []

    def work() -> None:
        with interrupts() as signals, signals.held(lambda: None):
            worked.append(signals.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert worked == [False]

"""No test depends on how it was started: signals that a background shell, nohup or a runner turned off are on again."""

from __future__ import annotations

import os
import signal

import pytest

from tests.conftest import STOPS, pytest_configure


@pytest.fixture(autouse=True)
def as_found():
    handlers = {number: signal.getsignal(number) for number in STOPS}
    mask, umask = signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.umask(0o022)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.umask(umask)


def test_ignored_and_blocked_signals_arrive_again() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    os.umask(0o077)
    pytest_configure()
    assert [signal.getsignal(number) for number in STOPS] == [signal.default_int_handler, *[signal.SIG_DFL] * 3]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPS)
    assert os.umask(0o022) == 0o022


def test_handlers_that_somebody_set_stay() -> None:
    signal.signal(signal.SIGTERM, handler := lambda *_: None)
    pytest_configure()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_this_run_hears_its_signals() -> None:
    for number in STOPS:
        assert signal.getsignal(number) is not signal.SIG_IGN

"""Ctrl-C more than once: the first asks and is answered, those of the same key press are ignored, a later one ends."""

from __future__ import annotations

import multiprocessing
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.launch import process_exit
from mixtral_run.launch.process_exit import StopOnce
from mixtral_run.launch.stop_request import SAVING_CHECKPOINT, StopRequest, stop_requests
from mixtral_run.launch.worker_errors import ERROR_DIRECTORY_VARIABLE


def test_only_a_late_ctrl_c_kills_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    now = [100.0]
    children = [SimpleNamespace(kill=lambda: killed.append(1)), SimpleNamespace(kill=lambda: killed.append(2))]
    monkeypatch.setattr(multiprocessing, "active_children", lambda: children)
    monkeypatch.setattr(process_exit, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    stop = StopOnce()
    with pytest.raises(BaseException, match="got signal"):
        stop(signal.SIGINT, None)
    for later, number, expected in (
        (0.1, signal.SIGINT, []), (1.9, signal.SIGINT, []), (9.0, signal.SIGTERM, []), (2.1, signal.SIGINT, [1, 2]),
    ):  # fmt: skip
        now[0] = 100 + later
        stop(number, None)
        assert killed == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_first_ctrl_c_is_answered_with_what_another_one_does(
    number: signal.Signals,
    parent: bool,
    first: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StopRequest, "ended_a_run", False)
    monkeypatch.delenv(ERROR_DIRECTORY_VARIABLE, raising=False)
    if parent:
        monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, "x")
    mesh: Any = SimpleNamespace(is_first=first, world_size=1)
    with stop_requests(mesh, SAVING_CHECKPOINT) as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.agreed()
    again = " Ctrl-C again ends at once, without it." if parent else ""
    expected = f"{SAVING_CHECKPOINT}{again}\n" if first and number == signal.SIGINT else ""
    assert capfd.readouterr().err == expected

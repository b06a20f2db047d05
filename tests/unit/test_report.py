"""What is said while something takes its time."""

from __future__ import annotations

import io
import time

import pytest

from mixtral_run.report import Report


def test_waiting_says_what_and_for_how_long_until_it_is_over() -> None:
    stream = io.StringIO()
    with Report(stream).waiting("Building", every_seconds=0.05):
        until = time.monotonic() + 20
        while "… Building (" not in stream.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    said = stream.getvalue().splitlines()
    assert said[0] == "  Building"
    assert said[1] == "… Building (0 s)"
    time.sleep(0.2)
    assert stream.getvalue().splitlines() == said


def test_waiting_ends_with_an_error_and_silence_stays_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), Report.silent().waiting("Building", every_seconds=0.01):
        time.sleep(0.05)
        raise ValueError("broken")
    assert capsys.readouterr().out == ""

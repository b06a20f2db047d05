"""Reports of work whose progress is unknown."""

from __future__ import annotations

import io
import time

import pytest

from mixtral_run.terminal.report import Report


def test_waiting_reports_the_elapsed_time_until_the_end() -> None:
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


def test_waiting_ends_with_an_error_and_a_silent_report_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), Report.silent().waiting("Building", every_seconds=0.01):
        time.sleep(0.05)
        raise ValueError("broken")
    assert capsys.readouterr().out == ""

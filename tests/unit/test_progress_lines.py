"""Progress without a terminal: lines now and then, and the end once lines came before it."""

from __future__ import annotations

import io

import pytest

from mixtral_run.terminal import report as reports
from mixtral_run.terminal.report import Report


@pytest.mark.parametrize(("quiet_seconds", "ends"), [(60, ["94%", "100%"]), (1000, [])])
def test_lines_end_at_the_whole(monkeypatch: pytest.MonkeyPatch, quiet_seconds: int, ends: list[str]) -> None:
    now = iter([0.0, *(61.0 if each == 15 else 62.0 if each == 16 else 1.0 for each in range(1, 17))])
    monkeypatch.setattr(reports.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(reports, "QUIET_SECONDS", quiet_seconds)
    stream = io.StringIO()
    with Report(stream=stream).progress(16, "reference", "samples") as progress:
        for _ in range(16):
            progress.advance(1)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ends

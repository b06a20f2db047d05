"""The live part of a terminal, as a person sees it at several widths, and plain lines elsewhere."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pexpect
import pytest
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from mixtral_run.terminal.live import (
    REFRESHES_PER_SECOND,
    ActivityRow,
    BarRow,
    Display,
    Row,
    TrainingFigures,
    TrainingRow,
    bar_line,
    in_bytes,
    sparkline,
)
from mixtral_run.terminal.report import Report
from tests.support.screen import Screen, on_terminal

PROGRAM = """
import time
from mixtral_run.terminal.live import TrainingFigures
from mixtral_run.terminal.report import Report
report = Report()
report.say("first line")
with report.progress(2_000_000_000, "copied") as bar:
    for _ in range(4):
        bar.advance(500_000_000)
        time.sleep(0.1)
with report.training(20, 0) as view:
    for iteration in range(1, 21):
        left = 20.0 - iteration
        view.update(TrainingFigures(iteration, 4.0 / iteration, 1e-4, 0.5, 12345.6, 6172.8, 70.25, left, "GPU"))
        if iteration == 10:
            view.validation.append((10, 1.23456))
            report.say("validation line " + "x" * 60)
            with report.progress(3, "validating", "passes") as bar:
                for _ in range(3):
                    bar.advance(1)
                    time.sleep(0.1)
            with report.activity("saving"):
                time.sleep(0.3)
        time.sleep(0.02)
report.done("complete")
"""


def figures(iteration: int = 3, **changes: float) -> TrainingFigures:
    values = {
        "loss": 1.25, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 12345.6,
        "tokens_per_second_per_process": 6172.8, "peak_memory_gib": 70.25, "eta_seconds": 3725.0,
    }  # fmt: skip
    return TrainingFigures(iteration, **(values | changes), processor="GPU")


@pytest.mark.parametrize("width", [50, 80, 200])
def test_what_a_person_sees(width: int) -> None:
    screen = on_terminal(PROGRAM, (), height=30, width=width)
    lines = [line for line in (*screen.scrolled, *screen.lines) if line]
    whole = "".join(lines)
    assert lines[0] == "first line" and lines[-1] == "✓ complete"
    [copied] = [line for line in lines if line.startswith("  copied")]
    assert "100%" in copied and "━" * 8 in copied
    # The view of the training is there once, in its last state, below all that was printed meanwhile.
    [bar] = [number for number, line in enumerate(lines) if line.startswith("  training")]
    assert "100%" in lines[bar] and "20 of 20" in lines[bar]
    assert lines[bar + 1].startswith("  loss 0.2000 █") and lines[bar + 1].endswith("▁")
    for fact in (
        "12,346 tokens/s",
        "6,173 tokens/s/GPU",
        "70.25 GiB",
        "learning rate 1.00e-04",
        "validation loss 1.2346",
    ):
        assert fact in " ".join(lines[bar + 2 : -1]), fact
    assert whole.index("validation line") < whole.index("  training")
    assert "saving" not in whole and "validating" not in whole


class _Some(Row):
    height = 3

    def lines(self, width: int) -> list[Text]:
        return [Text(f"row {number}") for number in range(self.height)]


def test_no_redraw_between_the_count_of_lines_and_a_printed_line(monkeypatch: pytest.MonkeyPatch) -> None:
    render, kept = Text.__rich_console__, [f"line {number}" for number in range(4)]

    def slow(text: Text, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        if text.plain == kept[3]:
            time.sleep(3 / REFRESHES_PER_SECOND)
        return render(text, console, options)

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(Text, "__rich_console__", slow)
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    display, row = Display(stream), _Some()
    display.add(row)
    for line in kept[:3]:
        assert display.say(line)
    row.height = 1
    assert display.say(kept[3])
    display.remove(row, keep=False)
    screen = Screen(30, 80)
    screen.feed(stream.getvalue())
    assert [line for line in screen.lines if line] == kept


def test_without_color_there_is_none() -> None:
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "NO_COLOR": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM], dimensions=(30, 80), encoding="utf-8", env=environment)
    styles = set(re.findall(r"\x1b\[([\d;]*)m", child.read()))
    # Bold and dim are no colors.
    assert styles <= {"", "0", "1", "2"}


def test_elsewhere_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    report = Report(stream)
    for terminal, name in ((False, "xterm"), (True, "dumb")):
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("TERM", name)
        with report.training(5, 0) as view, report.activity("loading") as row:
            assert view is None and row is None
    assert stream.getvalue() == ""


@pytest.mark.parametrize("width", range(20, 201, 15))
def test_no_line_is_too_wide(width: int) -> None:
    row = TrainingRow(100_000, 3, validation=[(1000, 2.0)])
    rows = [
        row,
        BarRow(95_000_000_000, "copied", "bytes"),
        BarRow(10, "validating", "passes"),
        ActivityRow("loading " * 9),
    ]
    shared = ActivityRow("tokenizing")
    shared.share, shared.text = 0.5, "1,000 of about 2,000 (50%) examples, 100 a second"
    for number in range(300):
        row.update(figures(number, loss=number))
    for each in (*rows, shared):
        for line in each.lines(width):
            assert line.cell_len <= width
    assert "50%" in shared.lines(width)[0].plain or width < 50


def test_the_time_that_is_left_comes_before_speed_and_size() -> None:
    amounts = ["1.0 GB of 2.0 GB", "100.0 MB/s", "ETA 0:00:10"]
    shown = {width: bar_line("copied", 0.5, amounts, width).plain for width in (40, 56, 70)}
    assert [[each in shown[width] for each in amounts] for width in shown] == [
        [False, False, True],
        [True, False, True],
        [True, True, True],
    ]


def test_a_sparkline_shows_the_course() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 20) == "█▇▆▅▄▃▂▁"
    assert sparkline([float("nan"), 1.0, float("inf"), 2.0], 20) == "▁█"
    assert sparkline([5.0, 5.0], 20) == "▁▁"
    assert sparkline([], 20) == sparkline([1.0], 0) == ""
    assert sparkline([0.0] * 50 + [1.0] * 50, 4) == "▁▁██"


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (9.5e10, "95.0 GB"), (5e15, "5000.0 TB")]
)
def test_bytes(amount: float, text: str) -> None:
    assert in_bytes(amount) == text

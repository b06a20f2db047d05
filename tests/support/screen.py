"""Run a program on a pseudo-terminal and read the screen as a person would see it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import termios
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pexpect

TOKEN = re.compile(r"\x1b\[(?P<arguments>[?\d;]*)(?P<control>[A-Za-z])|(?P<text>[^\x1b])", re.DOTALL)


@dataclass
class Screen:
    """Contents of a terminal. It supports the control sequences that a live table needs, and refuses others."""

    height: int
    width: int
    scrolled: list[str] = field(default_factory=list)
    """The lines that have left at the top."""
    scrolled_while_moving: int = 0
    """Number of them while the cursor was hidden, as it is while something moves."""
    cursor_shown: bool = True
    frames: list[list[str]] = field(default_factory=list)
    """The lines that were there whenever the cursor was shown again."""

    def __post_init__(self) -> None:
        self._cells = [[" "] * self.width for _ in range(self.height)]
        self._row = self._column = 0

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._cells]

    def feed(self, output: str) -> None:
        end = 0
        for token in TOKEN.finditer(output):
            assert token.start() == end, f"no control that is known: {output[end : end + 20]!r}"
            end = token.end()
            if token["text"]:
                self._put(token["text"])
            else:
                self._obey(token["arguments"], token["control"])

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
            return
        if character == "\n" or self._column == self.width:
            self._line_feed(keep_column=character == "\n")
        if character != "\n":
            self._cells[self._row][self._column] = character
            self._column += 1

    def _line_feed(self, keep_column: bool) -> None:
        if not keep_column:
            self._column = 0
        if self._row < self.height - 1:
            self._row += 1
            return
        self.scrolled.append("".join(self._cells.pop(0)).rstrip())
        self.scrolled_while_moving += not self.cursor_shown
        self._cells.append([" "] * self.width)

    def _obey(self, arguments: str, control: str) -> None:
        if control == "A":
            self._row = max(0, self._row - int(arguments or 1))
        elif (arguments, control) == ("2", "K"):
            self._cells[self._row] = [" "] * self.width
        elif (arguments, control) in (("?25", "h"), ("?25", "l")):
            self.cursor_shown = control == "h"
            if self.cursor_shown:
                self.frames.append(self.lines)
        else:
            assert control == "m", f"no control that is known: {arguments}{control}"


_ASK = """
import pathlib as _pathlib, sys as _sys, time as _time
_sys.stdout.write("{end}")
_sys.stdout.flush()
while not _pathlib.Path({seen!r}).exists():
    _time.sleep(0.02)
"""
_END = "\x1b[0mthe screen is complete"


def on_terminal(program: str, words: Sequence[str], height: int, width: int = 100, seconds: int = 120) -> Screen:
    """Run Python code to its end on a terminal of this size. It must succeed and restore the terminal's settings.

    The program ends only when everything that it wrote has been read: what is in a terminal when its last program ends
    may be lost on a machine that is busy.
    """
    settings = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS", "NO_COLOR")}
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen"
        child = pexpect.spawn(
            sys.executable, ["-c", program + _ASK.format(end=_END, seen=str(seen)), *words],
            dimensions=(height, width), encoding="utf-8", timeout=seconds,
            env={**settings, "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        before = termios.tcgetattr(child.child_fd)
        found = child.expect_exact([_END, pexpect.EOF])
        output = str(child.before)
        assert termios.tcgetattr(child.child_fd) == before
        seen.touch()
        if found == 0:
            child.expect(pexpect.EOF)
        # The program's end and that of its output are two events.
        assert child.wait() == 0, output[-3000:]
        child.close()
    screen = Screen(height, width)
    screen.feed(output)
    assert screen.cursor_shown
    return screen

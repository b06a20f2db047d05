"""Output of a verb while it works: steps, progress, tables. This module only renders; results are values elsewhere.

The command creates one `Report` and passes it down. Every rank but the first gets a silent one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from mixtral_run.errors import described
from mixtral_run.terminal.live import ActivityRow, BarRow, Display, Row, TrainingRow, is_live

STREAM_VARIABLE = "MIXTRAL_RUN_REPORT_STREAM"
"""Environment variable: `stderr` sends the reports of this process and of its child processes to standard error."""
DEBUG_VARIABLE = "MIXTRAL_RUN_DEBUG"
"""Environment variable that --debug sets: errors show their traceback, and libraries print their warnings."""
QUIET_SECONDS = 5.0
"""Interval of the progress lines that replace the progress bar if the output is not a terminal."""


def debugging() -> bool:
    """Return True if this process or the one that started it was called with --debug."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def quiet_libraries() -> None:
    """Hide the warnings of libraries, which address their developers. Do nothing with --debug."""
    if debugging():
        return
    import warnings

    warnings.filterwarnings("ignore")
    # transformers and huggingface_hub read these variables when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def repeating(every_seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` every `every_seconds` seconds in a background thread while the context is open."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_seconds):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Progress(ABC):
    """Counter of finished work. Several threads may call `advance`."""

    @abstractmethod
    def advance(self, amount: int) -> None: ...


class _Silent(Progress):
    def advance(self, amount: int) -> None:
        pass


class _Bar(Progress):
    def __init__(self, row: BarRow) -> None:
        self._row, self._lock = row, threading.Lock()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._row.done += amount


class _Lines(Progress):
    def __init__(self, total: int, what: str, unit: str, stream: TextIO) -> None:
        self._total, self._what, self._unit, self._stream = max(total, 1), what, unit, stream
        self._done = 0
        self._last, self._has_printed = time.monotonic(), False

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        # The end is said if lines came before, so that the last of them does not look like a stop.
        is_end = self._has_printed and self._done - amount < self._total <= self._done
        if now - self._last >= QUIET_SECONDS or is_end:
            self._last, self._has_printed = now, True
            amounts = f"{self._done:,} of {self._total:,} {self._unit}"
            print(f"  {self._what}: {self._done / self._total:4.0%} ({amounts})", file=self._stream, flush=True)


def json_text(document: object) -> str:
    """Return a JSON document for standard output. Escape other characters than ASCII only if it cannot take them."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # also half a surrogate pair, as names of files that are not UTF-8 have
        text = json.dumps(document, indent=2)
    return text


@contextmanager
def json_document(enabled: bool) -> Iterator[dict[str, Any]]:
    """Print one JSON object to stdout when the context ends: the entries of the dict, and the error if one was raised.

    The error is raised again, so that the caller reports it and sets the exit code.
    """
    document: dict[str, Any] = {}
    try:
        yield document
    except BaseException as error:
        document |= {"ok": False, "error": described(error)}
        raise
    finally:
        if enabled:
            print(json_text(document), flush=True)


class Report:
    """Printer of a verb's progress. `Report.silent()` returns one that prints nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or (sys.stderr if os.environ.get(STREAM_VARIABLE) == "stderr" else sys.stdout)
        self.enabled = True
        self._display: Display | None = None

    @classmethod
    def silent(cls) -> Report:
        report = cls()
        report.enabled = False
        return report

    @classmethod
    def on_stderr(cls) -> Report:
        """Return a report on standard error, for verbs whose standard output is a JSON document.

        Processes that this process starts later report to standard error as well.
        """
        os.environ[STREAM_VARIABLE] = "stderr"
        return cls(sys.stderr)

    def say(self, text: str = "") -> None:
        if self.enabled and not (self._display is not None and self._display.say(text)):
            print(text, file=self._stream, flush=True)

    def step(self, number: int, total: int, text: str) -> None:
        """Print a numbered step: `[2/5] Plan …`."""
        self.say(f"[{number}/{total}] {text}")

    def done(self, text: str) -> None:
        self.say(f"✓ {text}")

    def warn(self, text: str) -> None:
        self.say(f"! {text}")

    @contextmanager
    def waiting(self, what: str, every_seconds: float = 15.0) -> Iterator[None]:
        """Print a line, and every `every_seconds` seconds the time elapsed, for work whose progress is unknown.

        A terminal shows the time elapsed in one line instead.
        """
        if self._is_live:
            with self.activity(what.removesuffix(" …")):
                yield
            return
        started = time.monotonic()
        self.say(f"  {what}")
        with repeating(every_seconds, lambda: self.say(f"… {what} ({time.monotonic() - started:.0f} s)")):
            yield

    @contextmanager
    def progress(self, total: int, what: str, unit: str = "bytes") -> Iterator[Progress]:
        """Show a progress bar on a terminal, and a line every QUIET_SECONDS elsewhere.

        The last state of a bar stays, unless it was within a view.
        """
        if not self.enabled:
            yield _Silent()
        elif self._is_live:
            row = BarRow(total, what, unit)
            with self._shown(row, keep=True):
                yield _Bar(row)
        else:
            yield _Lines(total, what, unit, self._stream)

    @contextmanager
    def activity(self, what: str) -> Iterator[ActivityRow | None]:
        """Show on a terminal that something is going on, and for how long; yield None elsewhere."""
        if not self._is_live:
            yield None
            return
        row = ActivityRow(what)
        with self._shown(row, keep=False):
            yield row

    @contextmanager
    def training(self, total: int, start: int) -> Iterator[TrainingRow | None]:
        """Show on a terminal a view of the training; yield None elsewhere. start: iterations that are done."""
        if not self._is_live:
            yield None
            return
        row = TrainingRow(total, start)
        with self._shown(row, keep=True):
            yield row

    @property
    def _is_live(self) -> bool:
        return self.enabled and is_live(self._stream)

    @contextmanager
    def _shown(self, row: Row, *, keep: bool) -> Iterator[None]:
        if self._display is None:
            self._display = Display(self._stream)
        # A bar within the view of a training, such as that of each evaluation, leaves no line.
        keep = keep and not self._display.has_rows
        self._display.add(row)
        try:
            yield
        finally:
            self._display.remove(row, keep=keep)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        title: str | None = None,
        narrow: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
    ) -> None:
        """Print a table with one line per row; up to 140 columns wide if the output is not a terminal.

        Args:
            narrow: Columns and rows to print instead, without borders, if the terminal is too narrow for `rows`.
        """
        if not self.enabled:
            return
        from rich.console import Console
        from rich.table import Table

        width = None if self._stream.isatty() else 140
        console = Console(file=self._stream, width=width, highlight=False, markup=False)
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        if narrow and table.__rich_measure__(console, console.options.update(width=1000)).maximum > console.width:
            table = Table(*narrow[0], title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
            for row in narrow[1]:
                table.add_row(*row)
        console.print(table)

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
    def __init__(self, total: int, what: str, unit: str, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
        self._bar = RichProgress(
            TextColumn("  {task.description}"),
            BarColumn(),
            *amounts,
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task(what, total=total)
        self._bar.start()

    def advance(self, amount: int) -> None:
        self._bar.advance(self._task, amount)

    def close(self) -> None:
        self._bar.stop()


class _Lines(Progress):
    def __init__(self, total: int, what: str, unit: str, stream: TextIO) -> None:
        self._total, self._what, self._unit, self._stream = max(total, 1), what, unit, stream
        self._done = 0
        self._last = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= QUIET_SECONDS:
            self._last = now
            amounts = f"{self._done:,} of {self._total:,} {self._unit}"
            print(f"  {self._what}: {self._done / self._total:4.0%} ({amounts})", file=self._stream, flush=True)


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
            print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)


class Report:
    """Printer of a verb's progress. `Report.silent()` returns one that prints nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or (sys.stderr if os.environ.get(STREAM_VARIABLE) == "stderr" else sys.stdout)
        self.enabled = True

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
        if self.enabled:
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
        """Print a line, and every `every_seconds` seconds the time elapsed, for work whose progress is unknown."""
        started = time.monotonic()
        self.say(f"  {what}")
        with repeating(every_seconds, lambda: self.say(f"… {what} ({time.monotonic() - started:.0f} s)")):
            yield

    @contextmanager
    def progress(self, total: int, what: str, unit: str = "bytes") -> Iterator[Progress]:
        """Show a progress bar on a terminal, and a line every QUIET_SECONDS elsewhere."""
        if not self.enabled:
            yield _Silent()
        elif self._stream.isatty():
            bar = _Bar(total, what, unit, self._stream)
            try:
                yield bar
            finally:
                bar.close()
        else:
            yield _Lines(total, what, unit, self._stream)

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

"""The live part of a terminal: bars and a view of the training, redrawn in place below the lines that stay.

A terminal of 50 columns is enough. Colors are left out under NO_COLOR. Nothing here is used where the output is no
terminal (report.py).
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

REFRESHES_PER_SECOND = 4
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_LOSSES = 4000
_UNITS = ("B", "kB", "MB", "GB", "TB")


def is_live(stream: TextIO) -> bool:
    """Return True if a stream is a terminal that can redraw lines."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Row(ABC):
    """Some lines of the display."""

    @abstractmethod
    def lines(self, width: int) -> list[Text]:
        """Return the lines, none of them wider than `width`."""


class Display:
    """The rows at the end of a terminal. A thread redraws them while there are any.

    One lock is held from the count of the rows' lines until they are written. rich's own thread may redraw fewer lines
    in between, and what is printed then begins too far up, over lines that stay.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.console: Console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._rows: list[Row] = []
        self._live: Live | None = None
        self._lock = threading.RLock()

    @property
    def has_rows(self) -> bool:
        """True if anything is shown."""
        return bool(self._rows)

    def add(self, row: Row) -> None:
        """Show a row below the others."""
        from rich.live import Live

        with self._lock:
            self._rows.append(row)
            if self._live is None:
                self._live = Live(
                    console=self.console,
                    get_renderable=self._rendered,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self._live.start(refresh=True)
                threading.Thread(target=self._redraw, args=(self._live,), daemon=True).start()

    def remove(self, row: Row, *, keep: bool) -> None:
        """Take a row away. keep: its last state stays as lines."""
        with self._lock:
            self._rows.remove(row)
            if keep:
                for line in row.lines(self.console.width):
                    self.console.print(line, no_wrap=True, overflow="crop")
            if not self._rows and self._live is not None:
                self._live.stop()
                self._live = None

    def say(self, text: str) -> bool:
        """Print lines above the rows. Return False if there are none, and nothing was printed."""
        from rich.text import Text

        with self._lock:
            if self._live is None:
                return False
            self.console.print(Text(text), soft_wrap=True)
            return True

    def _redraw(self, live: Live) -> None:
        """Redraw the rows until another view, or none, is shown."""
        while True:
            time.sleep(1 / REFRESHES_PER_SECOND)
            with self._lock:
                if self._live is not live:
                    return
                live.refresh()

    def _rendered(self) -> Group:
        from rich.console import Group

        lines = [line for row in list(self._rows) for line in row.lines(self.console.width)]
        # More lines than the terminal has could not be redrawn in place.
        return Group(*lines[: max(1, self.console.height - 1)])


class BarRow(Row):
    """A bar of finished work with the time that is left. Several threads may call `advance`."""

    def __init__(self, total: int, what: str, unit: str) -> None:
        self._total, self._what, self._unit = total, what, unit
        self.done = 0
        self._started = time.monotonic()

    def lines(self, width: int) -> list[Text]:
        seconds = time.monotonic() - self._started
        rate = self.done / seconds if seconds > 0 else 0.0
        if self._unit == "bytes":
            amounts = [f"{in_bytes(self.done)} of {in_bytes(self._total)}", f"{in_bytes(rate)}/s"]
        else:
            amounts = [f"{self.done:,} of {self._total:,} {self._unit}"]
        left = (self._total - self.done) / rate if rate else None
        return [bar_line(self._what, self.done / max(self._total, 1), [*amounts, eta(left)], width)]


class ActivityRow(Row):
    """Work whose end is unknown, with the time that it has taken; or a share of it and a text, once they are known."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self.text, self.share = "", -1.0

    def lines(self, width: int) -> list[Text]:
        seconds = time.monotonic() - self._started
        if self.share >= 0:
            return [bar_line(self._what, self.share, [self.text], width)]
        sign = _SPINNER[int(seconds * REFRESHES_PER_SECOND) % len(_SPINNER)]
        return [
            _line(
                [(f"  {sign} ", "cyan"), (f"{self._what} {self.text}".rstrip(), ""), (f" {seconds:.0f} s", "dim")],
                width,
            )
        ]


@dataclass(frozen=True)
class TrainingFigures:
    """Figures of an iteration, as the live view shows them. processor: 'GPU' or 'process'."""

    iteration: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    tokens_per_second_per_process: float
    peak_memory_gib: float
    eta_seconds: float
    processor: str


@dataclass
class TrainingRow(Row):
    """Progress of a training run: bar, loss, speed and memory."""

    total: int
    iteration: int
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    _figures: TrainingFigures | None = None
    _updated: float = 0.0

    def update(self, figures: TrainingFigures) -> None:
        """Show the figures of another iteration."""
        self._figures, self._updated = figures, time.monotonic()
        self.iteration = figures.iteration
        self.losses.append(figures.loss)
        if len(self.losses) > _MOST_LOSSES:
            self.losses = self.losses[::2]

    def lines(self, width: int) -> list[Text]:
        figures = self._figures
        left = None if figures is None else max(0.0, figures.eta_seconds - (time.monotonic() - self._updated))
        amounts = [f"{self.iteration:,} of {self.total:,}", eta(left)]
        found = [bar_line("training", self.iteration / max(self.total, 1), amounts, width)]
        if figures is None:
            return found
        head = f"  loss {figures.loss:.4f} "
        found.append(_line([(head, "bold"), (sparkline(self.losses, min(width - len(head) - 1, 60)), "cyan")], width))
        facts = [
            f"{figures.tokens_per_second:,.0f} tokens/s",
            f"{figures.tokens_per_second_per_process:,.0f} tokens/s/{figures.processor}",
            f"{figures.peak_memory_gib:.2f} GiB",
            f"learning rate {figures.learning_rate:.2e}",
            f"grad norm {figures.grad_norm:.3f}",
        ]
        if self.validation:
            at, loss = self.validation[-1]
            facts.append(f"validation loss {loss:.4f} at {at:,}")
        return [*found, *(_line([(text, "")], width) for text in wrapped(facts, width))]


def bar_line(what: str, share: float, amounts: Sequence[str], width: int) -> Text:
    """Return `  what ━━━━━━╸     50% amounts`. What does not fit is left out, the last of the amounts first."""
    share = min(max(share, 0.0), 1.0)
    head, percent = f"  {what} ", f" {share:4.0%}"
    amounts = [each for each in amounts if each]
    while amounts and len(head) + len(percent) + sum(len(each) + 2 for each in amounts) + 8 > width:
        # Of the time that is left and of a speed the former is worth more.
        del amounts[-2 if len(amounts) > 1 else -1]
    tail = percent + "".join(f"  {each}" for each in amounts)
    size = min(40, max(0, width - len(head) - len(tail)))
    filled = round(share * size)
    return _line([(head, ""), ("━" * filled, "green"), ("─" * (size - filled), "dim"), (tail, "")], width)


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the values as blocks of eight heights, at most `width` of them: each is the mean of a stretch."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    means = []
    for number in range(count):
        part = finite[number * len(finite) // count : (number + 1) * len(finite) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / (high - low) * top) if high > low else 0] for mean in means)


def wrapped(facts: Sequence[str], width: int) -> list[str]:
    """Return the facts in lines, separated by dots."""
    found = [""]
    for fact in facts:
        longer = f"{found[-1]} · {fact}" if found[-1] else f"  {fact}"
        if len(longer) <= width or not found[-1]:
            found[-1] = longer
        else:
            found.append(f"  {fact}")
    return found


def eta(seconds: float | None) -> str:
    """Return the time that is left, as `ETA 1:02:03`; nothing if it is unknown."""
    if seconds is None:
        return ""
    whole = round(seconds)
    return f"ETA {whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def in_bytes(amount: float) -> str:
    """Return a number of bytes in a unit that suits it: 1.5 GB."""
    power = 0
    while amount >= 999.5 and power < len(_UNITS) - 1:
        amount, power = amount / 1000, power + 1
    return f"{amount:.0f} {_UNITS[power]}" if power == 0 else f"{amount:.1f} {_UNITS[power]}"


def _line(parts: Sequence[tuple[str, str]], width: int) -> Text:
    from rich.text import Text

    text = Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
    text.truncate(width, overflow="ellipsis")
    return text

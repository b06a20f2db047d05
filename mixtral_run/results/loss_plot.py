"""Plot of a run's losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
"""Pairs of an iteration and a loss."""

LOG_SCALE_RATIO = 8.0
"""A curve whose largest value exceeds its smallest by this factor is drawn on a logarithmic scale."""
Curve = tuple[str, Points, int, bool]
"""Name, points, number of the color (0 or 1), and True to draw every point."""
_COLORS, _GRID = ("#1f6feb", "#d1632a"), "#d0d7de"


def import_matplotlib() -> None:
    """Import the parts of matplotlib that a plot needs. Raises ImportError if it is not installed."""
    from matplotlib import figure, ticker
    from matplotlib.backends import backend_agg

    del figure, ticker, backend_agg


def write_loss_plot(
    path: Path, training: Points, validation: Points = (), *, title: str, label: str = "lm loss"
) -> None:
    """Write the losses as a PNG. The file appears whole or not at all.

    Args:
        path: of the file.
        training: iteration and loss; losses that are not finite leave a gap.
        validation: the same of the validation set.
        title: above the plot.
        label: of the loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = loss_figure(training, validation, title=title, label=label)
    partial = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_figure(str(partial), format="png")
    partial.rename(path)


def loss_figure(training: Points, validation: Points = (), *, title: str, label: str = "lm loss") -> Figure:
    """Return the figure. Its axes have plain numbers, on a logarithmic scale if the losses span orders of magnitude."""
    curves = [("training", training, 0, False), *([("validation", validation, 1, True)] if validation else [])]
    return _figure(curves, title=title, label=label)


def write_loss_curves(path: Path, curves: Sequence[Curve], *, title: str) -> None:
    """Write several curves into one plot, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(_figure(curves, title=title)).print_figure(str(path), format="png")


def _figure(curves: Sequence[Curve], *, title: str, label: str = "lm loss") -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    for name, points, color, marked in curves:
        steps, losses = [iteration for iteration, _ in points], [loss for _, loss in points]
        axes.plot(steps, losses, "o-" if marked else "-", color=_COLORS[color], linewidth=2, markersize=4, label=name)
    if len(curves) > 1:
        # A name that begins with an underscore would be left out of a legend made of labels.
        axes.legend(axes.get_lines(), [name for name, _, _, _ in curves], frameon=False)
    values = [loss for _, points, _, _ in curves for _, loss in points if math.isfinite(loss)]
    _readable(axes, values)
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", parse_math=False)
    axes.grid(True, which="both", color=_GRID, linewidth=0.6)
    if curves:
        _note_ends(axes, curves[0][1])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    return figure


def _readable(axes: Axes, values: Sequence[float]) -> None:
    """Choose the scale of the losses, and label both axes with plain numbers: 0.6, not 6 × 10⁻¹."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if values and min(values) > 0 and max(values) / min(values) > LOG_SCALE_RATIO:
        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 4 else (1,), numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.12g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _note_ends(axes: Axes, points: Points) -> None:
    """Write the first and the last loss next to the curve."""
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return
    first, last = finite[0], finite[-1]
    axes.annotate(f"{first[1]:.3g}", first, xytext=(6, 2), textcoords="offset points")
    if len(finite) > 1:
        axes.annotate(f"{last[1]:.3g}", last, xytext=(6, -4), textcoords="offset points")

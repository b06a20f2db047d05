"""The plot of a run's losses: numbers that people read, and curves that hold what they are given."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from mixtral_run.results.loss_plot import loss_figure, write_loss_plot

CURVES = {
    "three digits": [7.17 * 0.94**step for step in range(60)],
    "a small range": [0.62, 0.61, 0.6, 0.598],
    "six digits": [100.0 * 0.8**step for step in range(60)],
    "one point": [1.5],
    "a gap": [3.0, math.nan, 2.0],
    "zero": [1.0, 0.5, 0.0],
}


def shown_numbers(figure: object) -> list[tuple[str, float]]:
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticklabels(which="both"), [*axes.get_yticks(), *axes.get_yticks(minor=True)], strict=True)
    return [(label.get_text(), value) for label, value in ticks if low <= value <= high]


@pytest.mark.parametrize("losses", CURVES.values(), ids=CURVES)
def test_the_axes_have_plain_numbers(losses: list[float]) -> None:
    shown = shown_numbers(loss_figure(list(enumerate(losses, start=1)), title="Loss"))
    assert 3 <= len(shown) <= 16
    for label, value in shown:
        assert set(label) <= set("0123456789.-"), label
        assert float(label) == pytest.approx(value, abs=1e-12)


def test_the_curves_are_those_that_are_given() -> None:
    figure = loss_figure([(1, 3.0), (2, 2.5)], [(0, 3.1), (2, 2.7)], title="a $title$ that is no formula")
    training, validation = figure.axes[0].get_lines()
    assert [*zip(*training.get_data(), strict=True)] == [(1, 3.0), (2, 2.5)]
    assert [*zip(*validation.get_data(), strict=True)] == [(0, 3.1), (2, 2.7)]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "validation"]


def test_a_run_without_losses_has_a_plot(tmp_path: Path) -> None:
    write_loss_plot(tmp_path / "loss.png", [], title="Nothing yet")
    assert imread(tmp_path / "loss.png").shape == (540, 960, 4)
    assert [each.name for each in tmp_path.iterdir()] == ["loss.png"]

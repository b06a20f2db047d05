"""The curves of two runs in one picture: a page that needs no network, or a PNG."""

from __future__ import annotations

import importlib.resources
import string
from collections.abc import Sequence
from pathlib import Path

from mixtral_run.errors import ConfigError
from mixtral_run.results.read_run import RunData, curve
from mixtral_run.results.svg import Series, escaped, line_chart

SUFFIXES = (".html", ".png")
_CHARTS = (
    ("Loss", "metrics", "loss", True),
    ("Validation loss", "validation", "loss", True),
    ("Learning rate", "metrics", "learning_rate", False),
    ("Tokens/s", "metrics", "tokens_per_second", False),
)


def write_comparison(
    path: Path, runs: Sequence[RunData], names: Sequence[str], rows: Sequence[tuple[str, str, str]]
) -> None:
    """Write the curves of the runs.

    Args:
        path: a file that ends in .html or .png; an older one is replaced.
        runs: to compare.
        names: of the runs.
        rows: what differs, for the page.

    Raises:
        ConfigError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".png":
            _write_png(partial, runs, names)
        else:
            partial.write_text(comparison_page(runs, names, rows), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError("The comparison cannot be written.", where=f"--plot {path}", found=error.strerror) from error


def comparison_page(runs: Sequence[RunData], names: Sequence[str], rows: Sequence[tuple[str, str, str]]) -> str:
    """Return the page. All texts of files are escaped."""
    charts = []
    for title, lines, value, may_be_log in _CHARTS:
        series = [
            Series(f"{title}: {name}", curve(getattr(run, lines), value), style, marked=lines == "validation")
            for run, name, style in zip(runs, names, "ab", strict=False)
        ]
        drawing = line_chart(series, title, may_be_log=may_be_log)
        legend = "".join(
            f'<span><i class="{style}"></i>{escaped(name)}</span>' for name, style in zip(names, "ab", strict=False)
        )
        if drawing:
            charts.append(f'<div class="card"><h3>{title}</h3><div class="legend">{legend}</div>{drawing}</div>')
    table = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(one)}</td><td>{escaped(two)}</td></tr>'
        for name, one, two in rows
    )
    head = "".join(f"<td><b>{escaped(name)}</b></td>" for name in names)
    text = importlib.resources.files("mixtral_run.results").joinpath("report.html").read_text("utf-8")
    return string.Template(text).substitute(
        title=escaped(" and ".join(names)),
        name=escaped(" and ".join(names)),
        about=escaped(" · ".join(str(run.folder) for run in runs)),
        sections=f'<div class="charts">{"".join(charts)}</div><h2>What differs</h2><div class="card"><table>'
        f'<tr><th scope="row"></th>{head}</tr>{table}</table></div>',
    )


def _write_png(path: Path, runs: Sequence[RunData], names: Sequence[str]) -> None:
    from mixtral_run.results.loss_plot import write_loss_curves

    curves = [
        (
            f"{name}{', validation' if lines == 'validation' else ''}",
            curve(getattr(run, lines), "loss"),
            number,
            lines == "validation",
        )
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
        for lines in ("metrics", "validation")
    ]
    write_loss_curves(path, [each for each in curves if each[1]], title="Loss")

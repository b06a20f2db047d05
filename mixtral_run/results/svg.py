"""Charts as inline SVG. Colors are classes, which the page defines for light and dark screens."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_run.results.curves import Points, scale_of, short, thinned

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 10, 34
_ROW, _HEAD = 16, 34
_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def escaped(text: object) -> str:
    """Return a text for HTML. Characters that no page may have, or that turn its direction, are shown by their code."""
    return html.escape(_ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text)), quote=True)


@dataclass(frozen=True)
class Series:
    """A curve. style: class of its color, a to d. marked: draw every point."""

    name: str
    points: Points
    style: str = "a"
    marked: bool = False


def line_chart(series: Sequence[Series], label: str, *, may_be_log: bool = True) -> str:
    """Return a chart of values by iteration, or an empty text if no curve has a point.

    label: of the chart, for those who do not see it.
    """
    shown = [(each, thinned(each.points)) for each in series if each.points]
    if not shown:
        return ""
    steps = scale_of([x for _, points in shown for x, _ in points], may_be_log=False, whole=True)
    values = scale_of([y for _, points in shown for _, y in points], may_be_log=may_be_log)
    parts = []
    for tick in values.ticks:
        y = _y(values.place(tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.2f}" text-anchor="end">{short(tick)}</text>')
    for tick in steps.ticks:
        x = _x(steps.place(tick))
        parts.append(f'<text class="tick" x="{x:.2f}" y="{HEIGHT - 18}" text-anchor="middle">{short(tick)}</text>')
    parts.append(
        f'<text class="tick" x="{(WIDTH + _LEFT) / 2:g}" y="{HEIGHT - 3}" text-anchor="middle">iteration</text>'
    )
    for each, points in shown:
        places = [(_x(steps.place(x)), _y(values.place(y))) for x, y in points]
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
        parts.append(f'<polyline class="{each.style}" data-series="{escaped(each.name)}" points="{path}"/>')
        if each.marked or len(places) == 1:
            parts += [f'<circle class="{each.style}" cx="{x:.2f}" cy="{y:.2f}" r="3"/>' for x, y in places]
    limits = f'data-x="{steps.low!r} {steps.high!r}" data-y="{values.low!r} {values.high!r}"'
    kind = f'data-scale="{"log" if values.is_log else "linear"}"'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(label)}" {limits} {kind}>'
        + "".join(parts)
        + "</svg>"
    )


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def heat_map(shares: Sequence[Sequence[float]], label: str) -> str:
    """Return a table of shares by layer and expert: rows are layers, each of which sums to 1."""
    columns = max((len(row) for row in shares), default=0)
    if not columns:
        return ""
    largest = max(max(row) for row in shares) or 1.0
    width = (WIDTH - _LEFT - _RIGHT) / columns
    height = _HEAD + _ROW * len(shares) + 4
    parts = [f'<text class="tick" x="{(WIDTH + _LEFT) / 2:g}" y="11" text-anchor="middle">expert</text>']
    parts += [
        f'<text class="tick" x="{_LEFT + (each + 0.5) * width:.2f}" y="{_HEAD - 7}" text-anchor="middle">{each}</text>'
        for each in range(columns)
    ]
    for layer, row in enumerate(shares):
        top = _HEAD + layer * _ROW
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{top + 12}" text-anchor="end">layer {layer}</text>')
        for expert, share in enumerate(row):
            x = _LEFT + expert * width
            parts.append(
                f'<rect class="heat" x="{x:.2f}" y="{top}" width="{width - 1:.2f}" height="{_ROW - 1}" '
                f'fill-opacity="{0.75 * share / largest:.3f}"/>'
                f'<text class="cell" x="{x + width / 2:.2f}" y="{top + 11.5}" text-anchor="middle" '
                f'data-share="{share!r}">{share:.1%}</text>'
            )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escaped(label)}">' + "".join(parts) + "</svg>"

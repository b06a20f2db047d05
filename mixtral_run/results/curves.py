"""Curves for plots: fewer points, scales, and ticks that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
"""Pairs of an iteration and a value, both finite."""

MOST_POINTS = 800
LOG_SCALE_RATIO = 8.0
"""A curve whose largest value exceeds its smallest by this factor is drawn on a logarithmic scale."""


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` of the points: of each stretch the lowest and the highest, so that every spike stays."""
    if len(points) <= most:
        return list(points)
    count = most // 2
    found = []
    for number in range(count):
        part = points[number * len(points) // count : (number + 1) * len(points) // count]
        ends = {min(part, key=lambda each: each[1]), max(part, key=lambda each: each[1])}
        found += sorted(ends)
    found[0], found[-1] = points[0], points[-1]
    return found


@dataclass(frozen=True)
class Scale:
    """A scale of values: limits, ticks, and where a value is between the limits."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return 0 for `low`, 1 for `high`."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def scale_of(values: Sequence[float], *, may_be_log: bool = True, whole: bool = False) -> Scale:
    """Return a scale that contains the values, logarithmic if they are positive and span orders of magnitude.

    whole: ticks at whole numbers only.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if may_be_log and low > 0 and high / low > LOG_SCALE_RATIO:
        return _log_scale(low, high)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = _step((high - low) / 4)
    if whole:
        step = max(1.0, step)
        first = math.ceil(low / step)
        return Scale(low, high, tuple(step * number for number in range(first, math.floor(high / step) + 1)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * number for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def _step(about: float) -> float:
    power = 10.0 ** math.floor(math.log10(about))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= about), 10 * power)


def _log_scale(low: float, high: float) -> Scale:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        candidates = [factor * 10.0**power for power in decades for factor in factors]
        below = max((each for each in candidates if each <= low), default=low)
        above = min((each for each in candidates if each >= high), default=high)
        ticks = tuple(each for each in candidates if below <= each <= above)
        if len(ticks) <= 8:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / 8)]
    return Scale(below, above, ticks, is_log=True)


def short(value: float) -> str:
    """Return a number as people write it on an axis: 0.6, 1,500, 20k, 3M, 1e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.4g}"

"""Scales, ticks and thinned curves."""

from __future__ import annotations

import math
import random

import pytest

from mixtral_run.results.curves import scale_of, short, thinned


@pytest.mark.parametrize(
    "values",
    [
        [], [0.0], [5.0], [-3.0, 3.0], [0.5, 0.6], [7.2, 0.19], [1e-5, 1e5], [1e-30, 1.0], [1e300, 1.0], [0.0, 1e-9],
        [1e9, 1e9 + 1],
    ],
    ids=str,
)  # fmt: skip
def test_a_scale_contains_its_values_and_has_few_ticks(values: list[float]) -> None:
    scale = scale_of(values)
    assert 2 <= len(scale.ticks) <= 12
    assert all(scale.low <= tick <= scale.high * (1 + 1e-12) for tick in scale.ticks)
    for value in values:
        assert -1e-9 <= scale.place(value) <= 1 + 1e-9


def test_ticks_are_round_numbers() -> None:
    assert scale_of([0.0, 1.0]).ticks == pytest.approx((0, 0.5, 1.0))
    assert scale_of([0.19, 7.2]).ticks == pytest.approx((0.1, 0.2, 0.5, 1, 2, 5, 10))
    assert scale_of([1, 60], whole=True, may_be_log=False).ticks == (20, 40, 60)
    assert all(tick == int(tick) for tick in scale_of([1, 3], whole=True, may_be_log=False).ticks)


def test_a_thinned_curve_keeps_its_ends_and_every_spike() -> None:
    numbers = random.Random(1)
    points = [(at, math.sin(at / 9000) + numbers.random() / 10) for at in range(100_000)]
    points[41_234], points[77_777] = (41_234, 50.0), (77_777, -50.0)
    found = thinned(points)
    assert len(found) <= 800 and found == sorted(found)
    assert set(found) <= set(points) and {points[0], points[-1], points[41_234], points[77_777]} <= set(found)
    assert thinned(points[:5]) == points[:5]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.6, "0.6"), (0, "0"), (1500, "1,500"), (20_000, "20k"), (2.5e6, "2.5M"), (1e-5, "1e-05"), (-0.25, "-0.25")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text

"""The offset of the host's clock: behind is below zero, ahead above, and the nearest of several mirrors counts."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from tests.unit.host.checks.test_shortfalls import _collect
from tests.unit.host.conftest import load_module

MODULE = load_module("preflight")
ONE_O_CLOCK = "Thu, 01 Jan 1970 01:00:00 GMT"  # 3600 seconds since the epoch


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """STAND-IN for mirrors: the date that each reports, by URL."""
    dates: dict[str, str] = {}

    @contextlib.contextmanager
    def answer(request: object, timeout: float):
        yield SimpleNamespace(headers={"Date": dates[request.full_url]})

    monkeypatch.setattr(MODULE, "build_opener", lambda *_: SimpleNamespace(open=answer))
    return dates


@pytest.mark.parametrize(("now", "offset"), [(3540.0, -60.0), (3660.0, 60.0), (3600.0, 0.0)])
def test_the_sign(mirror: dict[str, str], monkeypatch: pytest.MonkeyPatch, now: float, offset: float) -> None:
    mirror["http://one/"] = ONE_O_CLOCK
    monkeypatch.setattr(MODULE.time, "time", lambda: now)
    assert MODULE._ask("http://one/", "", 1) == (None, offset)


@pytest.mark.parametrize(
    ("now", "offset"),
    [
        (3590.0, -10.0),  # 10 s behind the first, 70 s behind the second
        (3670.0, 10.0),  # 70 s ahead of the first, 10 s ahead of the second
        (3625.0, 25.0),  # 25 s ahead of the first, 35 s behind the second
        (3640.0, -20.0),  # 40 s ahead of the first, 20 s behind the second
    ],
)
def test_the_nearest_mirror_counts(
    mirror: dict[str, str], monkeypatch: pytest.MonkeyPatch, now: float, offset: float
) -> None:
    mirror.update({"http://one/": ONE_O_CLOCK, "http://two/": ONE_O_CLOCK.replace("01:00", "01:01")})
    monkeypatch.setattr(MODULE.time, "time", lambda: now)
    params = {"mirrors": list(mirror), "levels": {}, "proxy": "http://proxy", "no_proxy": "", "timeout_seconds": 1}
    assert MODULE._network(params)["clock_offset_seconds"] == offset


@pytest.mark.parametrize("offset", [-30.0, 30.0, -0.4])
def test_the_limit_itself_is_allowed_on_both_sides(offset: float) -> None:
    assert _collect(clock_offset_seconds=offset) == []

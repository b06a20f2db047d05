"""The record of a host's health watch, in `status`."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_run.fleet.status.health import health_of
from mixtral_run.fleet.status.page import page
from tests.unit.fleet.status.test_read_fleet import read

ACCEPTANCE = {"stamp": {"identity": {}}, "at": "now"}
NOW = 1_800_000_000


def record(*findings: tuple[str, str], seconds_ago: int = 60) -> dict[str, Any]:
    rows = [{"level": level, "text": text, "key": text} for level, text in findings]
    return {"findings": rows, "epoch": NOW - seconds_ago, "interval_seconds": 300, "gpus": []}


def test_status_shows_what_the_watch_found() -> None:
    assert read().health == ""
    status = read(records={"acceptance": ACCEPTANCE, "health": record()}, epoch=NOW)
    assert status.health == "fine" and status.warnings == read().warnings
    found = record(("warn", "GPU 1: PCIe x8 of x16"), ("bad", "Xid 79\x1b[2J on GPU 0"), ("unknown", "kernel log"))
    status = read(records={"acceptance": ACCEPTANCE, "health": found}, epoch=NOW)
    assert status.health == "1 bad, 1 warn, 1 unknown" and status.health in page([status])
    assert status.warnings[:3] == ("health: Xid 79 on GPU 0", "health: GPU 1: PCIe x8 of x16", "health: kernel log")


def test_a_timer_that_died_is_seen() -> None:
    assert health_of(record(seconds_ago=899), NOW).warnings == []
    late = health_of(record(seconds_ago=7200), NOW)
    assert str(late) == "not watched for 120 min" and "no look for 120 min" in late.warnings[0]


@pytest.mark.parametrize(
    "odd",
    [None, [], "x", {}, {"findings": 3}, {"findings": [], "epoch": "never", "interval_seconds": 1},
     record(("evil", "x")), {**record(), "findings": [3]}, {**record(), "epoch": 10**400}],
)  # fmt: skip
def test_a_record_in_another_form_is_reported_and_hides_nothing_else(odd: Any) -> None:
    status = read(records={"acceptance": ACCEPTANCE, "health": odd}, epoch=NOW)
    assert status.error is None and status.health == "1 unknown"
    assert "the record of the health watch cannot be read" in status.warnings[0]


def test_many_findings_are_counted() -> None:
    many = health_of(record(*((("bad", f"Xid {number}")) for number in range(30))), NOW)
    assert len(many.warnings) == 9 and many.warnings[-1] == "health: 22 more findings"

"""The live table on a terminal, for fifty hosts that repeat the events of a recorded play."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.screen import on_terminal
from tests.unit.fleet.bootstrap.test_progress import RECORDED

NAMES = [f"node-{number:02}" for number in range(50)]
FAILING = "node-31"

PROGRAM = """
import json, sys, time
from mixtral_run.fleet.bootstrap.progress import FleetProgress
from mixtral_run.fleet.bootstrap.view import make_view

with open(sys.argv[1]) as file:
    events = [json.loads(line) for line in file]
progress = FleetProgress(sys.argv[2:])
print("Connecting to 50 hosts …", flush=True)
with make_view(progress, sys.stdout) as view:
    for number, event in enumerate(events):
        view.update(progress.fold(event))
        if number % 100 == 0:
            time.sleep(0.1)
print("The end.")
"""


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """Return the events of the recorded play, in which gpu-02 fails, repeated for fifty hosts."""
    lines = []
    for line in RECORDED.read_text().splitlines():
        event = json.loads(line)
        data = event["event_data"]
        alike = {"gpu-01": [name for name in NAMES if name != FAILING], "gpu-02": [FAILING]}
        if "host" in data:
            lines += [{**event, "event_data": {**data, "host": name}} for name in alike[data["host"]]]
        else:
            counted = {key: value for key, value in data.items() if isinstance(value, dict)}
            for key, value in counted.items():
                data[key] = {name: value[old] for old, new in alike.items() if old in value for name in new}
            lines.append(event)
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("height", [24, 60])
def test_fifty_hosts_move_in_place(events: Path, height: int) -> None:
    screen = on_terminal(PROGRAM, [str(events), *NAMES], height)
    assert screen.scrolled == []
    # The table is erased: the line after it directly follows the line before it.
    assert [line for line in screen.lines if line] == ["Connecting to 50 hosts …", "The end."]
    (last,) = screen.frames
    rows = {line.split()[1]: line for line in last if line[:1] in "✓✗…·" and len(line.split()) > 1}
    assert "Fail in the middle: E: Could not get lock" in rows.pop(FAILING)
    assert all(row.split()[2:] == ["done", "1/8"] for row in rows.values()), rows
    if height > 50:
        assert rows.keys() | {FAILING} == set(NAMES)
    else:
        assert len(rows) == 19
        assert "and 30 more: 49 done, 1 failed in all" in "\n".join(last)

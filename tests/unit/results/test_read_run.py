"""The files of a run, of which any may be missing, damaged or somebody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mixtral_run.results.read_run import curve, loss_summary, number, read_run


def test_lines_come_in_the_order_of_iterations_and_the_last_of_each_counts(tmp_path: Path) -> None:
    lines = [{"iteration": 2, "loss": 3.0}, {"iteration": 1, "loss": 4.0}, {"iteration": 2, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    data = read_run(tmp_path)
    assert curve(data.metrics, "loss") == [(1, 4.0), (2, 2.0)]
    assert loss_summary(data) == {"first_loss": 4.0, "last_loss": 2.0, "lowest_loss": 2.0, "lowest_iteration": 2}
    assert data.is_run and not data.problems


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("metrics.jsonl", b'{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "lo', "1 of its lines cannot be read"),
        ("metrics.jsonl", b'[1]\n{"iteration": "x"}\n{"iteration": -1}\n', "3 of its lines cannot be read"),
        ("validation.jsonl", b"\xff\xfe" * 50, "lines cannot be read"),
        ("summary.json", b"[" * 100_000, "no JSON object"),
        ("summary.json", b"", "no JSON object"),
        ("run.json", b"7", "no JSON object"),
    ],
)
def test_damage_is_noted(tmp_path: Path, file: str, content: bytes, problem: str) -> None:
    (tmp_path / file).write_bytes(content)
    [found] = read_run(tmp_path).problems
    assert found.startswith(f"{file}: ") and found.endswith(problem)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "summary.json").mkdir()
    (tmp_path / "run.json").symlink_to("run.json")
    assert len(read_run(tmp_path).problems) == 3
    assert not read_run(tmp_path / "nowhere").is_run


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, [1]])
def test_what_is_no_number(value: object) -> None:
    assert number(value) is None
    assert curve([{"iteration": 1, "loss": value}], "loss") == []

"""Lines about the routers: when they are written, what they compare with, and what a resumed run continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixtral_run.results.read_run import read_run
from mixtral_run.train.outcome.router_log import MOST_LINES, RouterLog, router_summary


class Counts:
    """Counts as a model would give them, one after the other."""

    def __init__(self, *counts: list[list[int]]) -> None:
        self._counts = list(counts)

    def begin_step(self) -> None:
        pass

    def take(self) -> torch.Tensor:
        return torch.tensor(self._counts.pop(0))

    take_step = take


def lines(save: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (save / "router.jsonl").read_text().splitlines()]


def test_the_drift_is_the_part_of_the_tokens_that_moved(tmp_path: Path) -> None:
    counts = Counts([[5, 5], [8, 2]], [[10, 0], [4, 1]], [[6, 4], [2, 8]])
    log = RouterLog(counts, tmp_path, 1, 9, is_first=True)
    assert [log.note_training(iteration) for iteration in (1, 2)] == [0.0, 0.25]
    log.begin_validation()
    log.end_validation(2)
    assert [(line["iteration"], line["of"], line["drift"]) for line in lines(tmp_path)] == [
        (1, "training", [0.0, 0.0]),
        (2, "training", [0.5, 0.0]),
        (2, "validation", [0.0, 0.0]),  # the first of its kind
    ]
    # A resumed run compares with the base, and not with its own first iteration.
    again = RouterLog(Counts([[0, 10], [0, 10]]), tmp_path, 1, 9, is_first=True)
    again.open()
    again.end_validation(3)
    assert lines(tmp_path)[-1]["drift"] == [0.6, 0.2]
    assert router_summary(read_run(tmp_path), 3) == {
        "tokens": [[15, 5], [12, 3]],
        "drift_of": "validation",
        "drift": [0.6, 0.2],
        "dropped_tokens": 0,
        "retaken_steps": 3,
    }


@pytest.mark.parametrize(("log_interval", "iterations", "window"), [(1, 10, 1), (10, 95, 10), (7, 50_000, 56)])
def test_a_long_run_has_few_lines(tmp_path: Path, log_interval: int, iterations: int, window: int) -> None:
    log = RouterLog(Counts(*[[[1, 1]]] * 2000), tmp_path, log_interval, iterations, is_first=True)
    for iteration in range(1, iterations + 1):
        log.note_training(iteration)
    log.end_training(iterations)
    found = lines(tmp_path)
    assert len(found) <= MOST_LINES + 1
    assert [line["iteration"] for line in found] == [*range(window, iterations, window), iterations]
    assert sum(line["iterations"] for line in found) == iterations


def test_a_stopped_run_writes_what_it_has(tmp_path: Path) -> None:
    log = RouterLog(Counts([[1, 3]]), tmp_path, 10, 100, is_first=True)
    for iteration in (1, 2, 3):
        assert log.note_training(iteration) is None
    log.end_training(3)
    log.end_training(3)
    assert [(line["iteration"], line["iterations"], line["tokens"]) for line in lines(tmp_path)] == [(3, 3, [[1, 3]])]


def test_nothing_is_written_without_counts_and_by_other_ranks(tmp_path: Path) -> None:
    for log in (
        RouterLog(None, tmp_path, 1, 2, is_first=True),
        RouterLog(Counts([[1]]), tmp_path, 1, 2, is_first=False),
    ):
        log.open()
        log.note_training(1)
    assert not list(tmp_path.iterdir())
    assert router_summary(read_run(tmp_path), 0) is None

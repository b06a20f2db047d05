"""Choice of the number of workers and of their way to write, with a simulated clock and speeds."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from mixtral_run.weights.io.pace import WINDOW_SECONDS, Pace, Workers, candidates


class Disk:
    """Copies at a speed that depends on how many are allowed, and how they write."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        speeds: dict[Any, float],
        cores: int,
        workers: int | None = None,
        mappable: bool = False,
    ) -> None:
        monkeypatch.setattr("mixtral_run.weights.io.pace.num_cores", lambda: cores)
        self.now = 100.0
        self.speeds = speeds
        self.pace = Pace(workers, lambda: self.now, mappable=mappable)
        self.tried: list[Any] = []

    def run(self) -> Any:
        for _ in range(10_000):
            if self.pace.settled:
                return self._as_key(self.pace.chosen)
            self.pace.step()
            if self.tried[-1:] != [self._as_key(self.pace.now)]:
                self.tried.append(self._as_key(self.pace.now))
            self.now += 0.05
            self.pace.advance(int(self.speeds[self._as_key(self.pace.now)] * 0.05))
        raise AssertionError("never settled")

    @staticmethod
    def _as_key(workers: Workers) -> Any:
        return f"{workers.workers} mapped" if workers.mapped else workers.workers


@pytest.mark.parametrize(
    ("cores", "speeds", "chosen", "tried"),
    [
        (16, {4: 2e9, 8: 4e9, 16: 5e9, 32: 5.1e9}, 16, [4, 8, 16, 32, 16]),
        # The fewest that are about as fast.
        (16, {4: 1.02e9, 8: 1.01e9, 16: 1.03e9, 32: 1e9}, 4, [4, 8, 16, 32, 4]),
        # What is slower is not made slower still.
        (16, {4: 2e9, 8: 3e9, 16: 2e9, 32: 1e9}, 8, [4, 8, 16, 8]),
        (2, {4: 1e9, 8: 3e9}, 8, [4, 8]),
    ],
)
def test_the_fewest_that_are_as_fast_as_any(
    monkeypatch: pytest.MonkeyPatch, cores: int, speeds: dict[int, float], chosen: int, tried: list[int]
) -> None:
    disk = Disk(monkeypatch, speeds, cores)
    assert disk.pace.num_threads == candidates(cores)[-1]
    assert disk.run() == chosen == disk.pace.now.workers
    assert disk.tried == tried
    assert disk.now - 100.0 <= 5 * (WINDOW_SECONDS + 0.2)


@pytest.mark.parametrize(
    ("workers", "speeds", "chosen", "tried"),
    [
        (
            None,
            {4: 2e9, 8: 2e9, 16: 2.1e9, 32: 2e9, "4 mapped": 2e9, "8 mapped": 4e9, "16 mapped": 8e9, "32 mapped": 8e9},
            "16 mapped",
            [4, 8, 16, 32, "4 mapped", "8 mapped", "16 mapped", "32 mapped", "16 mapped"],
        ),
        # More that wait for each other's turn are slower still; more that map may not be.
        (
            None,
            {4: 4e9, 8: 2e9, "4 mapped": 3e9, "8 mapped": 6e9, "16 mapped": 5e9},
            "8 mapped",
            [4, 8, "4 mapped", "8 mapped", "16 mapped", "8 mapped"],
        ),
        (None, {4: 4e9, 8: 2e9, "4 mapped": 4e9, "8 mapped": 3e9}, 4, [4, 8, "4 mapped", "8 mapped", 4]),
        (6, {6: 1e9, "6 mapped": 2e9}, "6 mapped", [6, "6 mapped"]),
        (6, {6: 1e9, "6 mapped": 1e9}, 6, [6, "6 mapped", 6]),
        (1, {}, 1, []),
    ],
)
def test_mapped_memory_is_tried_where_it_may_be_faster(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, speeds: dict[Any, float], chosen: Any, tried: list[Any]
) -> None:
    disk = Disk(monkeypatch, speeds, 16, workers, mappable=True)
    assert disk.run() == chosen
    assert disk.pace.now == disk.pace.chosen
    assert disk.tried == tried


def test_a_configured_number_is_used() -> None:
    pace = Pace(3)
    assert (pace.num_threads, pace.chosen, pace.settled) == (3, Workers(3), True)
    for worker in range(3):
        pace.wait_for_turn(worker, lambda: False)


def test_those_held_back_end_when_no_work_is_left_or_all_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    for let_go in ("work is gone", "stopped"):
        disk = Disk(monkeypatch, {}, 16)
        stop = threading.Event()
        waiting = threading.Thread(target=disk.pace.wait_for_turn, args=(31, stop.is_set))
        waiting.start()
        time.sleep(0.05)
        assert waiting.is_alive()
        stop.set() if let_go == "stopped" else disk.pace.let_all_go()
        waiting.join(5)
        assert not waiting.is_alive()

"""How the number of workers is chosen, with a clock and speeds of the test's own."""

from __future__ import annotations

import threading
import time

import pytest

from mixtral_run.weights.pace import WINDOW_SECONDS, Pace, candidates


class Disk:
    """Copies at a speed that depends on how many are allowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speeds: dict[int, float], cores: int) -> None:
        monkeypatch.setattr("mixtral_run.weights.pace.num_cores", lambda: cores)
        self.now = 100.0
        self.speeds = speeds
        self.pace = Pace(None, lambda: self.now)
        self.tried: list[int] = []

    def run(self) -> int:
        for _ in range(10_000):
            if self.pace.settled:
                return self.pace.chosen
            self.pace.step()
            if self.tried[-1:] != [self.pace.allowed]:
                self.tried.append(self.pace.allowed)
            self.now += 0.05
            self.pace.advance(int(self.speeds[self.pace.allowed] * 0.05))
        raise AssertionError("never settled")


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
    assert disk.run() == chosen == disk.pace.allowed
    assert disk.tried == tried
    assert disk.now - 100.0 <= 5 * (WINDOW_SECONDS + 0.2)


def test_a_number_that_is_told_is_taken() -> None:
    pace = Pace(3)
    assert (pace.num_threads, pace.chosen, pace.settled) == (3, 3, True)
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

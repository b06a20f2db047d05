"""A stop that comes while a checkpoint is saved in the background, and what a save delays."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.terminal.report import Report
from mixtral_run.train import run_checkpoints, run_loop
from mixtral_run.train.run_checkpoints import RunCheckpoints


class SlowSaver:
    """Saves nothing; a save in the background takes `seconds`, of which `wait` are really waited for."""

    can_save_in_background = True

    def __init__(self, seconds: float, wait: float = 0.0) -> None:
        self.saved: list[tuple[str, int]] = []
        self._seconds, self._wait, self._pending = seconds, wait, False

    def plan_ahead(self) -> None:
        self.planned_after = len(self.saved)

    def poll(self) -> None:
        return None

    def finish(self) -> float | None:
        if not self._pending:
            return None
        time.sleep(self._wait)
        self._pending = False
        return self._seconds

    def save(self, request: int) -> None:
        self.saved.append(("at once", request))

    def save_in_background(self, request: int) -> None:
        self._pending = True
        self.saved.append(("in the background", request))


class Always:
    """An object whose every method does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture(autouse=True)
def _requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunCheckpoints, "_request", lambda _, iteration: iteration)


def run_of(saver: SlowSaver, save: Path) -> tuple[Any, PretrainConfig, RunCheckpoints]:
    config = PretrainConfig(load=Path("base"), mock_data=True, save=save, train_iters=9, save_interval=2)
    mesh = SimpleNamespace(is_first=False, device="cpu", world_size=1)
    run: Any = SimpleNamespace(start=0, report=Report(), mesh=mesh, meter=Always(), validation=None, model=None)
    return run, config, RunCheckpoints(run, saver, config, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("last", "seconds", "others", "expected", "newest"),
    [
        # Adapters: the last iteration is saved as well.
        (3, 149.0, True, [("in the background", 2), ("at once", 3)], 3),
        (3, 151.0, True, [("in the background", 2)], 2),
        # It was short here, and long on another rank.
        (3, 149.0, False, [("in the background", 2)], 2),
        # The stop came in the iteration that is being saved, before any save, or after the last iteration.
        (2, 151.0, True, [("in the background", 2)], 2),
        (1, 151.0, True, [("at once", 1)], 1),
        (9, 151.0, True, [*(("in the background", each) for each in (2, 4, 6, 8)), ("at once", 9)], 9),
    ],
)
def test_after_a_stop_a_long_save_is_not_followed_by_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: int,
    seconds: float,
    others: bool,
    expected: list[tuple[str, int]],
    newest: int,
) -> None:
    saver = SlowSaver(seconds)
    run, config, checkpoints = run_of(saver, tmp_path)
    iterations = [SimpleNamespace(iteration=each) for each in range(1, last + 1)]
    monkeypatch.setattr(run_loop, "train_iterations", lambda *_: iter(iterations))
    monkeypatch.setattr(run_checkpoints, "everywhere", lambda own, _: own and others)
    outcome: Any = SimpleNamespace(router=Always(), generations=Always(), prepare_report=lambda: None)
    stop: Any = SimpleNamespace(agreed=lambda: True)
    run_loop.train_and_save(run, config, checkpoints, stop, lambda *_: None, outcome)
    assert saver.planned_after == 0
    assert saver.saved == expected and (run.last, run.saved) == (last, newest)
    printed = " ".join("".join(capsys.readouterr()).split())
    said = f"Iteration {last} is not saved: a save takes more than 150 s" in printed
    assert said == (newest != last) == ("The newest checkpoint is that of iteration 2" in printed)


def test_the_delay_of_a_step_has_the_wait_for_the_save_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, checkpoints = run_of(SlowSaver(1.0, wait=0.2), tmp_path)
    for iteration in (2, 4):
        checkpoints.save(iteration, goes_on=True)
    checkpoints.finish()
    printed = " ".join("".join(capsys.readouterr()).split())
    delays = [float(each) for each in re.findall(r"delayed a step by ([0-9.]+) s", printed)]
    assert len(delays) == 2 and delays[0] < 0.2 <= delays[1]

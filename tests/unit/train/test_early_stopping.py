"""Early stopping: when it ends a run, and that a resumed run ends where an uninterrupted one does."""

import json
from typing import Any

import pytest

from mixtral_run.train.early_stopping import BestLoss

LOSSES = [3.0, 2.5, 2.6, 2.5, 2.4, 2.45, 2.5, 2.4, 2.3]


def ended_at(patience: int, losses: list[float] = LOSSES) -> tuple[int | None, int | None]:
    """Number of the evaluation that ends the run, and of the best one."""
    best = BestLoss()
    for number, loss in enumerate(losses):
        best.record(10 * number, loss)
        if best.is_over(patience):
            return number, best.best_iteration
    return None, best.best_iteration


def test_evaluations_without_a_new_lowest_loss_end_the_run() -> None:
    assert ended_at(0) == (None, 80)
    assert ended_at(1) == (2, 10)
    # An equal loss is no improvement.
    assert ended_at(2) == (3, 10)
    assert ended_at(3) == (7, 40)
    assert ended_at(4) == (None, 80)


def test_an_improvement_is_reported_once() -> None:
    best = BestLoss()
    assert [best.record(10 * number, loss) for number, loss in enumerate(LOSSES)] == [
        True, True, False, False, True, False, False, False, True,
    ]  # fmt: skip
    # The evaluation of the same iteration again, as after --resume, does not count.
    assert not best.record(80, 1.0) and best.best_loss == 2.3 and best.num_without_improvement == 0


@pytest.mark.parametrize("stopped", range(1, len(LOSSES)))
def test_a_resumed_run_counts_on(stopped: int) -> None:
    for patience in (1, 2, 3):
        best = BestLoss()
        for number, loss in enumerate(LOSSES):
            if number == stopped:
                best = BestLoss.from_mapping(json.loads(json.dumps(best.to_mapping())))
                # A resumed run evaluates first where the other one stopped.
                best.record(10 * (number - 1), LOSSES[number - 1])
            best.record(10 * number, loss)
            if best.is_over(patience):
                break
        assert (number if best.is_over(patience) else None, best.best_iteration) == ended_at(patience)


@pytest.mark.parametrize(
    "values", [None, {}, {"iteration": None}, {"iteration": 1, "loss": "x"}, {"iteration": 10, "loss": 1.0}]
)
def test_a_checkpoint_without_a_validation_loss_begins_anew(values: Any) -> None:
    assert BestLoss.from_mapping(values) == BestLoss()
    assert BestLoss().to_mapping() == {}

"""Learning rate: numbers written out, and equal to torch's and transformers' own schedulers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from mixtral_run.config.schedule import ScheduleConfig
from mixtral_run.train.lr_schedule import learning_rate


def rates(**settings: Any) -> list[float]:
    config = ScheduleConfig(**settings)
    assert config.problems() == []
    return [learning_rate(config, iteration) for iteration in range(config.iterations)]


def test_numbers_of_each_form() -> None:
    settings: dict[str, Any] = {"lr": 1.0, "lr_warmup_iters": 2, "train_iters": 7}
    assert rates(**settings, min_lr=0.2, lr_scheduler="linear") == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    # 0.2 + 0.8 × (1 + cos(k π / 4)) / 2
    cosine = [0.5, 1.0, 1.0, 0.88284271247, 0.6, 0.31715728753, 0.2]
    assert rates(**settings, min_lr=0.2, lr_scheduler="cosine") == pytest.approx(cosine)
    assert rates(**settings, lr_scheduler="constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates(lr=1.0, min_lr=0.25, train_iters=1) == [1.0]
    assert rates(lr=1.0, min_lr=0.25, train_iters=2) == [1.0, 0.25]


@pytest.mark.parametrize("form", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "iterations"), [(0, 12), (3, 20), (5, 7)])
def test_equal_to_the_schedulers_of_torch(form: str, warmup: int, iterations: int) -> None:
    lr, min_lr = 3e-4, 3e-5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = torch.optim.lr_scheduler
    steps = iterations - 1 - warmup
    main: Any = {
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, T_max=steps, eta_min=min_lr),
        "linear": lambda: schedulers.LinearLR(optimizer, 1.0, min_lr / lr, total_iters=steps),
        "constant": lambda: schedulers.ConstantLR(optimizer, 1.0),
    }[form]()
    if warmup:
        rising = schedulers.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
        main = schedulers.SequentialLR(optimizer, [rising, main], milestones=[warmup])
    expected = []
    for _ in range(iterations):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        main.step()
    more = {} if form == "constant" else {"min_lr": min_lr}
    found = rates(lr=lr, lr_warmup_iters=warmup, train_iters=iterations, lr_scheduler=form, **more)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_equal_to_transformers_one_step_on(form: str) -> None:
    """Transformers' first step has the rate 0, which trains nothing. The kit begins one step later, and its last
    iteration has --min-lr: of the formula of N − 1 steps it takes the steps 1 … N − 1 of the warmup, then 0 … on."""
    import transformers

    lr, warmup, iterations = 2e-4, 4, 25
    make: Any = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }[form]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer, warmup, iterations - 1)
    theirs = []
    for _ in range(iterations):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert theirs[0] == 0.0
    ours = rates(lr=lr, min_lr=0.0, lr_warmup_iters=warmup, train_iters=iterations, lr_scheduler=form)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)


def test_the_rate_never_rises_after_the_warmup() -> None:
    for form in ("cosine", "linear"):
        found = rates(lr=1e-3, min_lr=1e-5, lr_warmup_iters=10, train_iters=100, lr_scheduler=form)
        assert all(one < other for one, other in pairwise(found[:10]))
        assert all(one >= other for one, other in pairwise(found[9:]))
        assert found[9] == found[10] == 1e-3 and math.isclose(found[-1], 1e-5)


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "iterations"),
    [(3, 205, 8, 77), (1, 64, 8, 8), (0.5, 64, 8, 4), (0.1, 100, 1, 10), (0.001, 10, 8, 1), (2.5, 10, 4, 7)],
)
def test_epochs_are_iterations_once_the_samples_are_known(
    epochs: float, samples: int, batch: int, iterations: int
) -> None:
    config = ScheduleConfig(epochs=epochs, warmup_ratio=0.25)
    assert not config.knows_iterations
    with pytest.raises(ValueError, match="not known"):
        _ = config.iterations
    known = config.with_iterations(samples, batch)
    assert known.iterations == known.train_iters == iterations
    assert known.warmup_iters == math.ceil(iterations / 4)
    # Without --epochs nothing changes, and --train-iters has its default.
    assert ScheduleConfig().with_iterations(samples, batch).iterations == 10
    assert ScheduleConfig(train_iters=5).with_iterations(samples, batch).iterations == 5


@pytest.mark.parametrize(("ratio", "iterations", "warmup"), [(0.03, 100, 3), (0.03, 101, 4), (0.1, 30, 3), (0.0, 9, 0)])
def test_the_share_of_the_warmup_is_rounded_up_as_in_transformers(ratio: float, iterations: int, warmup: int) -> None:
    assert ScheduleConfig(train_iters=iterations, warmup_ratio=ratio).warmup_iters == warmup


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"epochs": 1.0, "train_iters": 5}, "--epochs and --train-iters: expected one of them; found both"),
        ({"warmup_ratio": 0.1, "lr_warmup_iters": 2}, "--lr-warmup-iters and --warmup-ratio: expected one of them"),
        ({"warmup_ratio": 0.95, "train_iters": 10}, "--warmup-ratio: expected a share that leaves an iteration"),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters: expected fewer than --train-iters (10); found 10"),
        ({"lr_scheduler": "constant", "min_lr": 1e-6}, "--min-lr: --lr-scheduler constant does not use it"),
        ({"lr_scheduler": "polynomial"}, "--lr-scheduler: expected one of cosine, linear, constant"),
        ({"epochs": 0.0}, "--epochs: expected more than 0"),
        ({"epochs": math.nan}, "--epochs: expected more than 0"),
        ({"warmup_ratio": math.nan}, "--warmup-ratio: expected at least 0"),
        ({"lr": 1e-6}, "--min-lr: expected at most --lr (1e-06); found 1e-05"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], problem: str) -> None:
    assert [each for each in ScheduleConfig(**settings).problems() if each.startswith(problem)]


def test_a_constant_rate_may_be_below_the_default_of_the_lowest() -> None:
    assert ScheduleConfig(lr=1e-6, lr_scheduler="constant").problems() == []


def test_a_warmup_as_long_as_the_epochs_is_refused_when_they_are_known() -> None:
    config = ScheduleConfig(epochs=1.0, lr_warmup_iters=8)
    assert config.problems() == []
    (problem,) = config.with_iterations(64, 8).warmup_problems()
    assert problem == "--lr-warmup-iters: expected fewer than the 8 iterations that --epochs 1 are; found 8"

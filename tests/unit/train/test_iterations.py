"""The loop asks the schedule for the iteration that it takes, from the first warmup step to the last."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.samples import MockSamples
from mixtral_run.train.run_loop import train_iterations
from mixtral_run.train.steps.step import StepResult

# Two steps of warmup to 1.0, then a line down to 0.2, which the last step has.
RATES = [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("start", [0, 1, 4])
def test_rates_of_a_run_and_of_one_that_continues(start: int) -> None:
    config = FinetuneConfig(
        load=Path("b"),
        save=Path("s"),
        mock_data=True,
        lr=1.0,
        min_lr=0.2,
        lr_warmup_iters=2,
        train_iters=7,
        lr_scheduler="linear",
        global_batch_size=1,
        micro_batch_size=1,
        seq_length=4,
    )
    asked: list[float] = []

    def step(batch: object, rate: float) -> StepResult:
        asked.append(rate)
        return StepResult(1.0, 1.0, 4)

    run: Any = SimpleNamespace(
        config=config,
        start=start,
        step=step,
        report=Report.silent(),
        data=SimpleNamespace(samples=MockSamples(16, 4, 1)),
        mesh=SimpleNamespace(data_rank=0, data_size=1, device=torch.device("cpu"), world_size=1, is_first=True),
        bad_steps=SimpleNamespace(note=lambda *_: None),
        meter=SimpleNamespace(tick=lambda: None, measure=lambda *found, **_: (found[0], found[3])),
    )
    stop: Any = SimpleNamespace(agreed=lambda: False)
    found = list(train_iterations(run, stop))
    assert asked == pytest.approx(RATES[start:])
    assert [iteration for iteration, _ in found] == list(range(start + 1, 8))
    assert [rate for _, rate in found] == asked

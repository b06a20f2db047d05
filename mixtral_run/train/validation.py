"""Evaluation of the validation set: its loss before the first iteration, at intervals, and after the last one."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mixtral_run.errors import TrainingError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, sum_over
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.samples import MicroBatch, Samples, stacked
from mixtral_run.train.metrics import append, format_seconds
from mixtral_run.train.steps.step import losses_of


@dataclass(frozen=True)
class ValidationMetrics:
    """One evaluation of the validation set. loss: mean over all tokens that count in it, the same on every rank."""

    iteration: int
    loss: float
    num_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """Perplexity: e to the power of the loss, limited to the range of a float."""
        return math.exp(min(self.loss, 700.0))

    def line(self, train_iters: int) -> str:
        return " | ".join(
            (
                f"validation {self.iteration:>{len(str(train_iters))}}/{train_iters}",
                f"lm loss: {self.loss:.6E}",
                f"perplexity: {self.perplexity:,.3f}",
                f"tokens in the loss: {self.num_tokens:,}",
                f"took {format_seconds(self.seconds)}",
            )
        )


class Validation:
    """The validation set and its evaluations so far. All ranks must construct one.

    file: receives a JSON line for each evaluation; None on all ranks but the first.
    """

    def __init__(
        self, samples: Samples | PackedSamples, micro_batch_size: int, report: Report, file: Path | None
    ) -> None:
        self._samples, self._micro_batch_size = samples, micro_batch_size
        self._report, self._file = report, file
        self.results: list[ValidationMetrics] = []

    def loss_at(self, iteration: int) -> float | None:
        """Return the loss after an iteration; None if there was no evaluation then."""
        return next((each.loss for each in reversed(self.results) if each.iteration == iteration), None)

    def evaluate(self, model: MixtralModel, iteration: int, stopped: Callable[[], bool]) -> ValidationMetrics | None:
        """Evaluate the whole validation set. Return None if a stop was requested meanwhile. All ranks must call.

        Args:
            model: is in its previous mode afterwards.
            iteration: the number of finished iterations.
            stopped: returns True on all ranks if a stop was requested; all ranks call it.

        Raises:
            TrainingError: the loss is not a number, or the file cannot be written.
        """
        mesh, started = model.mesh, time.perf_counter()
        passes = list(rows_by_pass(len(self._samples), self._micro_batch_size, mesh))
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        with evaluating(model), self._report.progress(len(passes), "validating", "passes") as progress:
            for rows in passes:
                if stopped():
                    return None
                total += losses_of(model, micro_batch(self._samples, rows)).double()
                progress.advance(1)
        num_tokens = sum(self._samples.num_loss_tokens(index) for index in range(len(self._samples)))
        loss = float(sum_over(total, mesh.data_group)) / num_tokens
        if not math.isfinite(loss):
            raise TrainingError(
                "The validation loss is not a number.",
                where=f"iteration {iteration}",
                found=f"lm loss {loss}",
                next_command="a smaller --lr, or --lr-warmup-iters",
            )
        metrics = ValidationMetrics(iteration, loss, num_tokens, time.perf_counter() - started)
        self.results.append(metrics)
        if self._file is not None:
            append(self._file, json.dumps({**asdict(metrics), "perplexity": metrics.perplexity}) + "\n")
        return metrics


def rows_by_pass(num_rows: int, micro_batch_size: int, mesh: Mesh) -> Iterator[tuple[int | None, ...]]:
    """Yield the rows of each pass on this data-parallel rank. All ranks make as many passes; None is a missing row."""
    step = micro_batch_size * mesh.data_size
    for first in range(mesh.data_rank * micro_batch_size, math.ceil(num_rows / step) * step, step):
        yield tuple(row if row < num_rows else None for row in range(first, first + micro_batch_size))


def micro_batch(samples: Samples | PackedSamples, rows: tuple[int | None, ...]) -> MicroBatch:
    """Return the rows as a micro batch. Missing rows become one without loss: all ranks run the experts together."""
    found = []
    for index in rows:
        row = samples.row(index or 0)
        if index is None:
            row = dataclasses.replace(row, loss_mask=np.zeros_like(row.loss_mask))
        found.append(row)
    return stacked(found)


@contextmanager
def evaluating(model: MixtralModel) -> Iterator[None]:
    """Disable gradients and dropout within the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

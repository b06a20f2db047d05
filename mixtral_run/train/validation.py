"""The loss of pairs that are kept back from training: before the first iteration, in between and after the last."""

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
from mixtral_run.report import Report
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.samples import MicroBatch, Samples, stacked
from mixtral_run.train.metrics import append, format_seconds
from mixtral_run.train.step import losses_of


@dataclass(frozen=True)
class ValidationMetrics:
    """One look at the pairs kept back. loss: mean over all their response tokens, the same on every rank."""

    iteration: int
    loss: float
    num_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """e to the loss, as far as a float goes."""
        return math.exp(min(self.loss, 700.0))

    def line(self, train_iters: int) -> str:
        return " | ".join(
            (
                f"validation {self.iteration:>{len(str(train_iters))}}/{train_iters}",
                f"lm loss: {self.loss:.6E}",
                f"perplexity: {self.perplexity:,.3f}",
                f"response tokens: {self.num_tokens:,}",
                f"took {format_seconds(self.seconds)}",
            )
        )


class Validation:
    """Pairs kept back, and what was found of them. Without a file nothing is written. All ranks must make one."""

    def __init__(
        self, samples: Samples | PackedSamples, micro_batch_size: int, report: Report, file: Path | None
    ) -> None:
        self._samples, self._micro_batch_size = samples, micro_batch_size
        self._report, self._file = report, file
        self.found: list[ValidationMetrics] = []

    def look(self, model: MixtralModel, iteration: int, stopped: Callable[[], bool]) -> ValidationMetrics | None:
        """Go through all pairs; None where a stop was asked for meanwhile. All ranks must call.

        stopped: to be asked on all ranks at once. Raises TrainingError where the file takes no more lines.
        """
        mesh, started = model.mesh, time.perf_counter()
        passes = list(shares(len(self._samples), self._micro_batch_size, mesh))
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
                "The loss of the pairs kept back is no number.",
                where=f"iteration {iteration}",
                found=f"lm loss {loss}",
                next_command="a smaller --lr, or --lr-warmup-iters",
            )
        metrics = ValidationMetrics(iteration, loss, num_tokens, time.perf_counter() - started)
        self.found.append(metrics)
        if self._file is not None:
            append(self._file, json.dumps({**asdict(metrics), "perplexity": metrics.perplexity}) + "\n")
        return metrics


def shares(num_rows: int, micro_batch_size: int, mesh: Mesh) -> Iterator[tuple[int | None, ...]]:
    """The rows of this data-parallel rank, pass by pass; as many passes on every rank, where None stands for no row."""
    step = micro_batch_size * mesh.data_size
    for first in range(mesh.data_rank * micro_batch_size, math.ceil(num_rows / step) * step, step):
        yield tuple(row if row < num_rows else None for row in range(first, first + micro_batch_size))


def micro_batch(samples: Samples | PackedSamples, rows: tuple[int | None, ...]) -> MicroBatch:
    """The rows, and in place of none another that counts for nothing: experts are asked by all ranks at once."""
    found = []
    for index in rows:
        row = samples.row(index or 0)
        if index is None:
            row = dataclasses.replace(row, loss_mask=np.zeros_like(row.loss_mask))
        found.append(row)
    return stacked(found)


@contextmanager
def evaluating(model: MixtralModel) -> Iterator[None]:
    """Without gradients and dropout while this lasts."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

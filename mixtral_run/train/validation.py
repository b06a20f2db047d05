"""Evaluation of the validation set: its loss before the first iteration, at intervals, and after the last one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixtral_run.errors import TrainingError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, sum_over
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.preferences import FileSamples
from mixtral_run.train.data.samples import AnswerSource, micro_batch
from mixtral_run.train.metrics import IN_LINES, append, format_seconds
from mixtral_run.train.steps.objective import NextToken, Objective, parts_of


@dataclass(frozen=True)
class ValidationMetrics:
    """One evaluation of the validation set. loss: mean over all tokens that count in it, the same on every rank.

    With preferences: the loss over the whole set as one batch; num_tokens: of the answers; figures: of the objective.
    """

    iteration: int
    loss: float
    num_tokens: int
    seconds: float
    loss_name: str = "lm loss"
    figures: Mapping[str, float] | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity: e to the power of the loss, limited to the range of a float."""
        return math.exp(min(self.loss, 700.0))

    def to_mapping(self) -> dict[str, Any]:
        """Return the values of a line of validation.jsonl."""
        names = ("iteration", "loss", "num_tokens", "seconds")
        own = {"perplexity": self.perplexity} if self.figures is None else self.figures
        return {name: getattr(self, name) for name in names} | dict(own)

    def line(self, train_iters: int) -> str:
        figures = self.figures
        own = [f"perplexity: {self.perplexity:,.3f}"]
        if figures is not None:
            own = [f"{name}: {figures[name]:.4f}" for name in IN_LINES if name in figures]
        return " | ".join(
            (
                f"validation {self.iteration:>{len(str(train_iters))}}/{train_iters}",
                f"{self.loss_name}: {self.loss:.6E}",
                *own,
                f"tokens in the loss: {self.num_tokens:,}",
                f"took {format_seconds(self.seconds)}",
            )
        )


class Validation:
    """The validation set and its evaluations so far. All ranks must construct one.

    file: receives a JSON line for each evaluation; None on all ranks but the first.
    """

    def __init__(
        self,
        samples: FileSamples,
        micro_batch_size: int,
        report: Report,
        file: Path | None,
        objective: Objective | None = None,
        loss_name: str = "lm loss",
    ) -> None:
        self._samples, self._micro_batch_size = samples, micro_batch_size
        self._objective, self._loss_name = objective or NextToken(), loss_name
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
        count = sum(self._samples.num_loss_tokens(index) for index in range(len(self._samples)))
        self._prepare(model, passes, count)
        total = torch.zeros(1, dtype=torch.float64, device=mesh.device)
        with evaluating(model), self._report.progress(len(passes), "validating", "passes") as progress:
            for rows in passes:
                if stopped():
                    return None
                total = total + parts_of(model, micro_batch(self._samples, rows), self._objective, 1)
                progress.advance(1)
        loss, *sums = sum_over(total, mesh.data_group).tolist()
        loss /= count
        if not math.isfinite(loss):
            raise TrainingError(
                "The validation loss is not a number.",
                where=f"iteration {iteration}",
                found=f"{self._loss_name} {loss}",
                next_command="a smaller --lr, or --lr-warmup-iters",
            )
        metrics = ValidationMetrics(
            iteration,
            loss,
            self._samples.num_loss_tokens_total,
            time.perf_counter() - started,
            self._loss_name,
            self._objective.figures(sums) if sums else None,
        )
        self.results.append(metrics)
        if self._file is not None:
            append(self._file, json.dumps(metrics.to_mapping()) + "\n")
        return metrics

    def _prepare(self, model: MixtralModel, passes: Sequence[tuple[int | None, ...]], count: int) -> None:
        """Prepare the objective for the set as one batch. All ranks must call."""
        samples = self._samples
        num_text = sum(map(samples.num_text_tokens, range(len(samples)))) if isinstance(samples, AnswerSource) else 0
        self._objective.prepare(model, (micro_batch(samples, rows) for rows in passes), count, num_text)


def rows_by_pass(num_rows: int, micro_batch_size: int, mesh: Mesh) -> Iterator[tuple[int | None, ...]]:
    """Yield the rows of each pass on this data-parallel rank. All ranks make as many passes; None is a missing row."""
    for rows_of_ranks in rows_of_all_ranks(num_rows, micro_batch_size, mesh.data_size):
        yield rows_of_ranks[mesh.data_rank]


def rows_of_all_ranks(
    num_rows: int, micro_batch_size: int, data_size: int
) -> Iterator[tuple[tuple[int | None, ...], ...]]:
    """Yield the rows of each pass on each of `data_size` data-parallel ranks. None is a missing row."""
    step = micro_batch_size * data_size
    for first in range(0, num_rows, step):
        rows = [row if row < num_rows else None for row in range(first, first + step)]
        yield tuple(tuple(rows[at : at + micro_batch_size]) for at in range(0, step, micro_batch_size))


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

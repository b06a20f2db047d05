"""Steps that are not taken: their loss is not a number, or exceeds --max-loss-ratio.

All ranks decide alike, before the optimizer changes anything. The batch is written for inspection.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mixtral_run.config.verbs.training import RunConfig, TrainingConfig
from mixtral_run.errors import TrainingError
from mixtral_run.model.parallel.mesh import Mesh, everywhere
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.samples import GlobalBatch
from mixtral_run.train.steps.step import StepResult
from mixtral_run.weights.io.files import write_atomically

FOLDER = "bad_batches"
"""Folder in the adapter's folder for the batches of bad steps."""
NUM_RECENT = 50
"""Losses whose median --max-loss-ratio refers to."""
LEAST_RECENT = 5
"""Losses from which on the median counts."""


class BadSteps:
    """The losses of a run so far, and the steps that were not taken. The same on every rank.

    num_taken: steps that the optimizer took since the run's first iteration, before a --resume included.
    """

    def __init__(self, config: TrainingConfig, mesh: Mesh, report: Report) -> None:
        self._loss_name = config.loss_name
        self._ratio: float | None = None
        self._most = 0
        self._folder: Path | None = None
        if isinstance(config, RunConfig) and config.save is not None:
            self._ratio, self._most, self._folder = config.max_loss_ratio, config.skip_bad_steps, config.folder / FOLDER
        self._mesh, self._report = mesh, report
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self.num_taken = self.num_skipped = 0

    @property
    def is_active(self) -> bool:
        """Return True if the step must ask before it changes anything, for which it waits for the GPU."""
        return self._ratio is not None or self._most > 0

    @property
    def recent(self) -> tuple[float, ...]:
        """Return the last losses, which a checkpoint stores."""
        return tuple(self._recent)

    def restore(self, recent: Iterable[float], num_taken: int, num_skipped: int) -> None:
        """Continue from what a checkpoint stored."""
        self._recent.extend(recent)
        self.num_taken, self.num_skipped = num_taken, num_skipped

    def refuses(self, loss: float, grad_norm: float) -> bool:
        """Return True on all ranks if the step with this loss is not to be taken. All ranks must call."""
        return not everywhere(self._why(loss, grad_norm) is None, torch.device("cpu"))

    def note(self, result: StepResult, iteration: int, batch: GlobalBatch) -> None:
        """Note the result of an iteration. Raises TrainingError if it was bad and no more may be skipped."""
        why = self._why(result.loss, result.grad_norm)
        if result.taken and why is None:
            self._recent.append(result.loss)
            self.num_taken += 1
            return
        file = self._write(iteration, batch, why or "refused by another rank")
        found = why or f"{self._loss_name} {result.loss}"
        if not result.taken and self.num_skipped < self._most:
            self.num_skipped += 1
            self._report.warn(f"Iteration {iteration} is skipped ({self.num_skipped} of {self._most}): {found}{file}")
            return
        raise TrainingError(
            "The loss or its gradient is not a number."
            if not _is_finite(result)
            else "The loss has risen above --max-loss-ratio.",
            where=f"iteration {iteration}",
            found=f"{found}{file}",
            next_command="a smaller --lr, or --lr-warmup-iters; --resume continues from the last checkpoint, and "
            f"--skip-bad-steps {self._most + 1} does not learn from such a batch",
        )

    def _why(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"{self._loss_name} {loss}, grad norm {grad_norm}"
        if self._ratio is None or len(self._recent) < LEAST_RECENT:
            return None
        median = statistics.median(self._recent)
        if loss <= self._ratio * median:
            return None
        return (
            f"{self._loss_name} {loss:.6g}, more than {self._ratio:g} times {median:.6g}, the median of the last "
            f"{NUM_RECENT}"
        )

    def _write(self, iteration: int, batch: GlobalBatch, why: str) -> str:
        """Write this rank's part of a batch; return where, as the end of a sentence. A full disk is reported."""
        if self._folder is None:
            return ""
        file = self._folder / f"iter_{iteration:07d}-data{self._mesh.data_rank}.json"
        if self._mesh.tensor_rank == self._mesh.context_rank == 0:
            content = {
                "iteration": iteration,
                "why": why,
                "micro_batches": [_to_mapping(m) for m in batch.micro_batches],
            }
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(content) + "\n")
            except OSError as error:
                return f"; the batch cannot be written: {error.strerror}"
        return f"; its batch is in {self._folder}"


def _is_finite(result: StepResult) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


def _to_mapping(micro: Any) -> dict[str, Any]:
    """Return token ids, labels and the loss mask of a micro batch, a list for each row."""
    return {
        "tokens": micro.tokens.tolist(),
        "labels": micro.labels.tolist(),
        "loss_mask": micro.loss_mask.int().tolist(),
        "lengths": micro.lengths,
    }

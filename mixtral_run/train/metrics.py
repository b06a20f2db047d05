"""Speed, memory and loss of a run, and the log line in the format that Megatron's users know."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from mixtral_run.errors import TrainingError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.live import TrainingFigures


@dataclass(frozen=True)
class IterationMetrics:
    """One iteration of the whole job; rates are over the iterations since the last line.

    skipped: the step was not taken (bad_steps.py), and its loss may not be a number. loss_name: of the loss in lines.
    figures: further figures of the objective, by name.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    global_batch_size: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    tokens_per_second: float
    tokens_per_second_per_process: float
    tflops_per_process: float
    peak_memory_gib: float
    eta_seconds: float
    skipped: bool = False
    loss_name: str = "lm loss"
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Return the values of a line of metrics.jsonl. JSON has no NaN."""
        values = asdict(self)
        del values["loss_name"]
        values |= values.pop("figures")
        return {
            name: None if isinstance(each, float) and not math.isfinite(each) else each for name, each in values.items()
        }

    def scalars(self) -> dict[str, float]:
        """Return the values for TensorBoard."""
        names = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gib")
        return {name: getattr(self, name) for name in names} | dict(self.figures)

    def live_figures(self, processor: str) -> TrainingFigures:
        """Return the values for the live view. processor: 'GPU' or 'process'."""
        values = {item.name: getattr(self, item.name) for item in fields(TrainingFigures) if item.name != "processor"}
        return TrainingFigures(**values, processor=processor)

    def line(self, processor: str) -> str:
        """Return `iteration 10/10 | … | lm loss: 1.234567E+00 | …`. processor: 'GPU' or 'process'."""
        return " | ".join(
            (
                f"iteration {self.iteration:>{len(str(self.train_iters))}}/{self.train_iters}",
                f"consumed samples: {self.consumed_samples}",
                f"seconds per iteration: {self.seconds:.3f}",
                f"tokens/s: {self.tokens_per_second:,.0f}",
                f"tokens/s/{processor}: {self.tokens_per_second_per_process:,.0f}",
                f"TFLOP/s/{processor}: {self.tflops_per_process:.1f}",
                f"learning rate: {self.learning_rate:.3E}",
                f"global batch size: {self.global_batch_size}",
                f"{self.loss_name}: {self.loss:.6E}",
                *(f"{name}: {self.figures[name]:.4f}" for name in IN_LINES if name in self.figures),
                f"grad norm: {self.grad_norm:.3f}",
                f"peak GB: {self.peak_memory_gib * 1.073741824:.2f}",
                f"ETA: {format_seconds(self.eta_seconds)}",
            )
        )


IN_LINES = ("rewards/accuracies", "rewards/margins", "kl")
"""Figures of preferences that the line of an iteration and of an evaluation has."""


def format_seconds(seconds: float) -> str:
    """Format a duration: 3661 → '1:01:01'."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def flops_per_token(architecture: MixtralArchitecture, seq_length: int, *, trains_weights: bool) -> float:
    """Return the floating-point operations of a token's matrix products, forward and backward, without recomputation.

    Each active parameter costs 2 operations forward and 2 for the gradient of its input; if it is trained, 2 more for
    its own gradient. Attention adds 2 products of (on average sequence/2) × heads × head size, three times in all.
    """
    per_parameter = 6 if trains_weights else 4
    attention = 2 * 2 * architecture.num_layers * architecture.projection_size * seq_length / 2
    return per_parameter * architecture.num_active_parameters + 3 * attention


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak of the GPU memory that torch reserved, or on a CPU of the resident size, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1024**3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


class Meter:
    """Times iterations and computes their metrics, a line in `metrics.jsonl` each."""

    def __init__(
        self,
        *,
        train_iters: int,
        global_batch_size: int,
        seq_length: int,
        world_size: int,
        flops_per_token: float,
        device: torch.device,
        file: Path | None,
        loss_name: str = "lm loss",
    ) -> None:
        self._loss_name = loss_name
        self._train_iters = train_iters
        self._global_batch_size = global_batch_size
        self._tokens = global_batch_size * seq_length
        self._world_size = world_size
        self._flops_per_token = flops_per_token
        self._device = device
        self._file = file
        self._started = self._last = time.perf_counter()
        self._pending = 0
        self._measured: list[tuple[int, float]] = []

    def tick(self) -> None:
        """Count an iteration. Call it at the end of each one, after its results reached the host."""
        self._pending += 1

    def measure(
        self,
        iteration: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        *,
        skipped: bool = False,
        figures: Mapping[str, float] | None = None,
    ) -> IterationMetrics:
        """Return the metrics over the iterations since the last call."""
        now = time.perf_counter()
        seconds = (now - self._last) / max(self._pending, 1)
        self._measured.append((self._pending, seconds))
        self._last, self._pending = now, 0
        rate = self.tokens_per_second(seconds)
        # The first measurement includes the warm-up: leave it out of the forecast if there are others.
        steady = self._measured[1:] or self._measured
        forecast = sum(count * each for count, each in steady) / sum(count for count, _ in steady)
        metrics = IterationMetrics(
            iteration=iteration,
            train_iters=self._train_iters,
            consumed_samples=iteration * self._global_batch_size,
            global_batch_size=self._global_batch_size,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            seconds=seconds,
            tokens_per_second=rate,
            tokens_per_second_per_process=rate / self._world_size,
            tflops_per_process=self.tflops_per_process(seconds),
            peak_memory_gib=peak_memory_gib(self._device),
            eta_seconds=forecast * (self._train_iters - iteration),
            skipped=skipped,
            loss_name=self._loss_name,
            figures=figures or {},
        )
        if self._file is not None:
            append(self._file, json.dumps(metrics.to_mapping()) + "\n")
        return metrics

    def restart(self) -> None:
        """Exclude the time since the last measurement, such as that of a checkpoint."""
        self._last = time.perf_counter()

    def tokens_per_second(self, seconds: float) -> float:
        """Return the rate of the whole job for an iteration of this duration."""
        return self._tokens / seconds

    def tflops_per_process(self, seconds: float) -> float:
        """Return 10^12 operations a second and process for an iteration of this duration."""
        return self.tokens_per_second(seconds) * self._flops_per_token / self._world_size / 1e12

    @property
    def steady_seconds(self) -> float:
        """The median duration of an iteration, without the first, which warms up, if there are others."""
        return statistics.median(seconds for _, seconds in self._measured[1:] or self._measured)

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self._started


def append(file: Path, text: str) -> None:
    """Append a line. Raises TrainingError if the file cannot be written."""
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(text)
    except OSError as error:
        raise TrainingError(
            "The metrics of an iteration cannot be written.",
            where=str(file),
            found=error.strerror,
            next_command=f"df -h {shlex.quote(str(file.parent))}, then the same command with --resume",
        ) from error


@contextmanager
def tensorboard_scalars(folder: Path | None) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield a function that writes an iteration's scalars to TensorBoard; it does nothing without a folder."""
    if folder is None:
        yield lambda *_: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(iteration: int, scalars: Mapping[str, float]) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)

        yield write


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

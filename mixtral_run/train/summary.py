"""Summary of a finished run as one JSON object: speed, time, and the memory of every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.early_stopping import BestLoss
from mixtral_run.train.metrics import Meter, peak_memory_gib
from mixtral_run.train.validation import ValidationMetrics


@dataclass(frozen=True)
class ValidationSummary:
    """Validation losses: before the first iteration (of this start), at the end, and the lowest one.

    Attributes:
        first_iteration: 0, or the iteration from which --resume continued.
    """

    first_iteration: int
    first_loss: float
    last_loss: float
    lowest_loss: float
    lowest_iteration: int

    @classmethod
    def of(cls, found: Sequence[ValidationMetrics]) -> Self | None:
        """Summarize the evaluations. Return None if there are none."""
        if not found:
            return None
        lowest = min(found, key=lambda each: each.loss)
        return cls(found[0].iteration, found[0].loss, found[-1].loss, lowest.loss, lowest.iteration)

    def line(self, save: Path) -> str:
        """Return a line to print; if an earlier iteration was better, with the flag that selects or saves it."""
        first = f"at iteration {self.first_iteration}" if self.first_iteration else "before"
        line = f"validation loss {self.first_loss:.4f} {first}, {self.last_loss:.4f} at the end"
        if self.lowest_loss == self.last_loss:
            return line
        line += f"; lowest {self.lowest_loss:.4f} at iteration {self.lowest_iteration}"
        best = self.best_adapter(save)
        if best != save:
            return f"{line}, which --adapter {best} selects"
        saved = self.lowest_iteration == 0 or (save / f"iter_{self.lowest_iteration:07d}").is_dir()
        return line if saved else f"{line}, of which there is no checkpoint (--save-interval)"

    def best_adapter(self, save: Path) -> Path:
        """Return the checkpoint in `save` with the lowest loss, or `save` if that is the last one or was not saved."""
        folder = save / f"iter_{self.lowest_iteration:07d}"
        return folder if self.lowest_loss < self.last_loss and folder.is_dir() else save


@dataclass(frozen=True)
class Summary:
    """Figures of one run, without the iterations before a --resume.

    Attributes:
        seconds: from the start of the first iteration to the end, with checkpoints.
        seconds_per_iteration: the median without the first iteration, which warms up; the rates are of this median.
        peak_memory_gib: of each process in the order of ranks; on GPUs as torch counts it, without the CUDA context and
            NCCL.
        base_precision: form in which the frozen experts are stored: fp32, bf16, fp8 or nf4.
        attention_precision: form in which the frozen projections of attention and the output layer are stored: fp32,
            bf16 or fp8.
        last_iteration, train_iters: at which the run ended, and at which it was to end.
        epochs: of --epochs; None if --train-iters was given.
        best_iteration, best_validation_loss: of the lowest validation loss, iterations before a --resume included.
        stopped_early: True if --early-stopping-patience ended the run.
        expert_chunks, recompute_layers: of the settings or the planner; the latter is None for all layers.
    """

    iterations: int
    load_seconds: float
    seconds: float
    seconds_per_iteration: float
    tokens_per_second: float
    tokens_per_second_per_process: float
    tflops_per_process: float
    peak_memory_gib: tuple[float, ...]
    device: str
    num_processes: int
    tensor_model_parallel_size: int
    expert_model_parallel_size: int
    context_parallel_size: int
    recompute: str
    base_precision: str
    attention_precision: str
    validation: ValidationSummary | None
    last_iteration: int
    train_iters: int
    epochs: float | None
    best_iteration: int | None
    best_validation_loss: float | None
    stopped_early: bool
    expert_chunks: int = 1
    recompute_layers: int | None = None

    def line(self, processor: str) -> str:
        """Return a line to print. processor: 'GPU' or 'process'."""
        return (
            f"{self.tokens_per_second_per_process:,.0f} tokens/s/{processor}, "
            f"{self.tflops_per_process:.1f} TFLOP/s/{processor} in the median iteration; "
            f"peak {max(self.peak_memory_gib) * 1.073741824:.2f} GB on the fullest {processor}; "
            f"loaded in {self.load_seconds:.1f} s"
        )


def summarize(
    meter: Meter,
    mesh: Mesh,
    *,
    iterations: int,
    load_seconds: float,
    recompute: str,
    base_precision: str,
    attention_precision: str,
    validation: Sequence[ValidationMetrics],
    last_iteration: int,
    train_iters: int,
    epochs: float | None,
    best: BestLoss,
    stopped_early: bool,
    expert_chunks: int = 1,
    recompute_layers: int | None = None,
) -> Summary:
    """Return the summary of the meter's measurements, the same on every rank. All ranks must call."""
    peaks: list[float | None] = [None] * mesh.world_size
    dist.all_gather_object(peaks, peak_memory_gib(mesh.device))
    seconds = meter.steady_seconds
    on_gpu = mesh.device.type == "cuda"
    return Summary(
        iterations=iterations,
        load_seconds=load_seconds,
        seconds=meter.total_seconds,
        seconds_per_iteration=seconds,
        tokens_per_second=meter.tokens_per_second(seconds),
        tokens_per_second_per_process=meter.tokens_per_second(seconds) / mesh.world_size,
        tflops_per_process=meter.tflops_per_process(seconds),
        peak_memory_gib=tuple(peak or 0.0 for peak in peaks),
        device=torch.cuda.get_device_name(mesh.device) if on_gpu else "cpu",
        num_processes=mesh.world_size,
        tensor_model_parallel_size=mesh.tensor_size,
        expert_model_parallel_size=mesh.expert_size,
        context_parallel_size=mesh.context_size,
        recompute=recompute,
        base_precision=base_precision,
        attention_precision=attention_precision,
        validation=ValidationSummary.of(validation),
        last_iteration=last_iteration,
        train_iters=train_iters,
        epochs=epochs,
        best_iteration=best.best_iteration,
        best_validation_loss=best.best_loss if best.best_iteration is not None else None,
        stopped_early=stopped_early,
        expert_chunks=expert_chunks,
        recompute_layers=recompute_layers,
    )

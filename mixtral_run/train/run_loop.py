"""What LoRA and full fine-tuning have in common: opening data and model, the iterations, the end of a run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, RunConfig, TrainingConfig
from mixtral_run.launch.heartbeat import note_step
from mixtral_run.launch.stop_request import StopRequest
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, everywhere
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.samples import batches
from mixtral_run.train.data.sources import TrainingData, open_data_everywhere
from mixtral_run.train.load_model import load_for_training
from mixtral_run.train.lr_schedule import learning_rate
from mixtral_run.train.metrics import IterationMetrics, Meter, flops_per_token, format_seconds
from mixtral_run.train.outcome.record import Outcome
from mixtral_run.train.preflight import reserved_bytes
from mixtral_run.train.quantized_experts import CacheOptions
from mixtral_run.train.run import Run
from mixtral_run.train.run_checkpoints import RunCheckpoints
from mixtral_run.train.summary import summarize
from mixtral_run.weights.manifest.describe import BaseDescription

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


def open_data(config: ConfigT, base: BaseDescription, report: Report) -> tuple[ConfigT, TrainingData]:
    """Return the data, and the config with the iterations that --epochs are. All ranks must call."""
    data = open_data_everywhere(config, base, report)
    config = config.with_iterations(data.num_samples, config.global_batch_size)
    data.describe(config, report)
    return config, data


def load_model(
    config: TrainingConfig, base: BaseDescription, mesh: Mesh, report: Report, lora: LoraSettings | None
) -> tuple[MixtralModel, float]:
    """Return the model and the seconds that loading took."""
    started = time.perf_counter()
    report.say(
        f"Loading {base.folder} onto {mesh.world_size} × {mesh.device.type} as {mesh.layout}, "
        f"data-parallel {mesh.data_size} …"
    )
    precision, cache = "bf16", None
    if isinstance(config, FinetuneConfig):
        precision = config.base_precision
        cache = CacheOptions(config.quantized_cache, report, reserved_bytes(config, base))
    with report.activity("loading"):
        model = load_for_training(
            config, base, mesh, lora, recompute=config.recomputation, base_precision=precision, cache=cache
        )
    seconds = time.perf_counter() - started
    report.say(f"Loaded in {seconds:.1f} s")
    return model, seconds


def train_and_save(
    run: Run,
    config: RunConfig,
    checkpoints: RunCheckpoints,
    stop: StopRequest,
    write: Callable[[int, Mapping[str, float]], None],
    outcome: Outcome,
) -> None:
    """Train to the end, or until a stop, with evaluations and checkpoints. All ranks must call."""
    saved = done = run.start
    is_over = False
    _evaluate(run, config, done, stop, write, outcome)
    if done == 0:
        outcome.generations.write(run.model, done, stop.agreed, run.report)
        run.meter.restart()
    for metrics in train_iterations(run, stop):
        done = metrics.iteration
        if done == run.start + 1:
            # From here on the host mostly waits for the GPU.
            checkpoints.plan_ahead()
            outcome.prepare_report()
        checkpoints.poll()
        if run.mesh.is_first and (done % config.log_interval == 0 or done == config.iterations):
            show(run, metrics)
            write(done, metrics.scalars())
        moved = outcome.router.note_training(done)
        if moved is not None:
            write(done, {"router_drift": moved})
        is_best = (done % config.eval_interval == 0 or done == config.iterations) and _evaluate(
            run, config, done, stop, write, outcome
        )
        is_over = _is_over(run, config)
        if not is_over and done != config.iterations and (done % config.save_interval == 0 or is_best):
            checkpoints.save(done, goes_on=True)
            saved = done
            run.meter.restart()
        if is_over:
            break
    outcome.router.end_training(done)
    is_stopped = done != config.iterations and not is_over
    if checkpoints.finish_at_end(done, is_stopped=is_stopped) and done != saved:
        checkpoints.save(done, goes_on=False)
        saved = done
    run.last, run.saved = done, saved
    if done != run.start and not stop.agreed():
        outcome.generations.write(run.model, done, stop.agreed, run.report)


def show(run: Run, metrics: IterationMetrics) -> None:
    """Show the figures of an iteration: in the view of a terminal, or as a line."""
    if run.view is not None:
        run.view.update(metrics.live_figures(processor_of(run.mesh)))
    else:
        run.report.say(metrics.line(processor_of(run.mesh)))


def _is_over(run: Run, config: RunConfig) -> bool:
    """Return True on all ranks if --early-stopping-patience ends the run. All ranks must call."""
    if not config.early_stopping_patience:
        return False
    return everywhere(run.best.is_over(config.early_stopping_patience), run.mesh.device)


@dataclass(frozen=True)
class Ending:
    """What the last lines of a run say. what: was trained; result: is in --save; next_words: of the command, with a
    place for the folder of the best checkpoint.
    """

    what: str
    result: str
    next_words: str


def report_end(run: Run, config: RunConfig, outcome: Outcome, ending: Ending, num_retaken: int = 0) -> None:
    """Write the summary, the plot and the page, and print the end of the run. All ranks must call."""
    done = run.last
    is_over = run.best.is_over(config.early_stopping_patience)
    summary = summarize(
        run.meter,
        run.mesh,
        iterations=done - run.start,
        load_seconds=run.load_seconds,
        recompute=config.recomputation,
        base_precision=run.model.settings.base_storage,
        attention_precision=run.model.settings.attention_storage,
        validation=run.validation.results if run.validation is not None else (),
        last_iteration=done,
        train_iters=config.iterations,
        epochs=config.epochs,
        best=run.best,
        stopped_early=is_over and done < config.iterations,
        expert_chunks=config.expert_chunks or 1 if isinstance(config, FinetuneConfig) else 1,
        recompute_layers=config.recompute_layers,
    )
    if run.mesh.is_first:
        outcome.end(summary, num_retaken)
    if done < config.iterations and not is_over:
        where = "it" if run.saved == done else f"after iteration {run.saved}"
        run.report.warn(f"Stopped at iteration {done} of {config.iterations}, as requested; --resume continues {where}")
        return
    if done < config.iterations:
        run.report.say(
            f"Stopped early at iteration {done} of {config.iterations}: {run.best.evaluations()} "
            f"without a validation loss below {run.best.best_loss:.4f}, that of iteration {run.best.best_iteration}"
        )
    run.report.done(
        f"{ending.what} complete: {done} iteration{'s' * (done != 1)} in {format_seconds(run.meter.total_seconds)}, "
        f"{ending.result} in {config.folder}"
    )
    run.report.say(f"  {summary.line(processor_of(run.mesh))}")
    if summary.validation is not None:
        run.report.say(f"  {summary.validation.line(config.folder)}")
    best = config.folder if summary.validation is None else summary.validation.best_adapter(config.folder)
    run.report.say(f"  next: mixtral-run {ending.next_words.format(shlex.quote(str(best)))}")


def _evaluate(
    run: Run,
    config: RunConfig,
    iteration: int,
    stop: StopRequest,
    write: Callable[[int, Mapping[str, float]], None],
    outcome: Outcome,
) -> bool:
    """Evaluate the validation set, if there is one. Its time counts for no iteration.

    Returns True if the iteration's checkpoint is to be saved, as its loss is the lowest and a later end may want it.
    """
    if run.validation is None:
        return False
    outcome.router.begin_validation()
    metrics = run.validation.evaluate(run.model, iteration, stop.agreed)
    if metrics is not None:
        outcome.router.end_validation(iteration)
    run.meter.restart()
    if metrics is None:
        return False
    if run.mesh.is_first:
        run.report.say(metrics.line(config.iterations))
        if run.view is not None:
            run.view.validation.append((iteration, metrics.loss))
        figures = {f"validation_{name}": value for name, value in (metrics.figures or {}).items()}
        write(iteration, {"validation_loss": metrics.loss} | figures)
    # A resumed run evaluates where it starts; a run without the interruption would not have done so.
    if iteration % config.eval_interval != 0 and iteration != config.iterations:
        return False
    is_best = run.best.record(iteration, metrics.loss)
    return everywhere(is_best, run.mesh.device) and config.early_stopping_patience > 0


def _first_pass(run: Run) -> AbstractContextManager[None]:
    """Show that the first iteration takes longer, on GPUs."""
    if run.mesh.device.type != "cuda":
        return nullcontext()
    return run.report.waiting("The first iteration, which compiles kernels that are not cached …")


def train_iterations(run: Run, stop: StopRequest) -> Iterator[IterationMetrics]:
    """Train to the end or until a stop is requested. Yield the metrics of each iteration."""
    config = run.config
    stream = batches(
        run.data.samples,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        data_parallel_rank=run.mesh.data_rank,
        data_parallel_size=run.mesh.data_size,
        consumed_samples=run.start * config.global_batch_size,
    )
    for iteration, batch in zip(range(run.start, config.iterations), stream, strict=False):
        note_step(iteration + 1, on_gpu=run.mesh.device.type == "cuda" and run.mesh.world_size > 1)
        rate = learning_rate(config, iteration)
        with _first_pass(run) if iteration == run.start else nullcontext():
            result = run.step(batch, rate)
        run.bad_steps.note(result, iteration + 1, batch)
        run.meter.tick()
        yield run.meter.measure(
            iteration + 1, result.loss, result.grad_norm, rate, skipped=not result.taken, figures=result.figures
        )
        if stop.agreed():
            return


def meter_of(config: TrainingConfig, base: BaseDescription, mesh: Mesh, file: Path | None) -> Meter:
    """Return the meter of a run. file: of its metrics."""
    if file is not None and mesh.is_first:
        file.parent.mkdir(parents=True, exist_ok=True)
    return Meter(
        train_iters=config.iterations,
        global_batch_size=config.global_batch_size,
        seq_length=config.seq_length * config.rows_per_sample,
        world_size=mesh.world_size,
        flops_per_token=flops_per_token(
            base.architecture, config.seq_length, trains_weights=isinstance(config, PretrainConfig)
        ),
        device=mesh.device,
        file=file if mesh.is_first else None,
        loss_name=config.loss_name,
    )


def processor_of(mesh: Mesh) -> str:
    """Return what a rank computes on, for figures."""
    return "GPU" if mesh.device.type == "cuda" else "process"

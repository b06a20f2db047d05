"""The training loop: LoRA fine-tuning, and a few iterations of full training."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch

from mixtral_run.config.verbs.training import FinetuneConfig, PretrainConfig, TrainingConfig
from mixtral_run.launch.heartbeat import note_step
from mixtral_run.launch.stop_request import StopRequest, stop_requests
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, everywhere, open_mesh
from mixtral_run.planner.choose import peer_access_fits
from mixtral_run.results.run_files import METRICS, TENSORBOARD, VALIDATION
from mixtral_run.run_lock import LOCK_NAME, lock_file_of
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.init_adapter import load_init_adapter
from mixtral_run.train.checkpoints.newest_good import settle_resume
from mixtral_run.train.checkpoints.run_folder import own_output, report_disk_use
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.samples import batches
from mixtral_run.train.data.sources import TrainingData, open_data_everywhere
from mixtral_run.train.load_model import load_for_training, loaded
from mixtral_run.train.lr_schedule import learning_rate
from mixtral_run.train.metrics import IterationMetrics, Meter, flops_per_token, format_seconds
from mixtral_run.train.outcome.log_to import scalar_loggers
from mixtral_run.train.outcome.record import Outcome
from mixtral_run.train.preferences.prepare import objective_of, prepare_references
from mixtral_run.train.preflight import adapter_bytes, reserved_bytes
from mixtral_run.train.quantized_experts import CacheOptions
from mixtral_run.train.run import Run
from mixtral_run.train.run_checkpoints import RunCheckpoints, remove_leftovers, resume_run
from mixtral_run.train.steps.bad_steps import BadSteps
from mixtral_run.train.steps.cuda_graph import backward_of
from mixtral_run.train.steps.sgd_in_backward import SgdInBackward
from mixtral_run.train.steps.step import Backward, Step, adapter_optimizer, optimizer_step, trainable
from mixtral_run.train.summary import summarize
from mixtral_run.train.validation import Validation
from mixtral_run.weights.manifest.describe import BaseDescription, describe_base

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)
EXPERTS_HAVE = {"each": "one adapter per expert", "shared": "one adapter for all experts of a layer"}


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune with LoRA, on answers or on preferences, and save adapters. All ranks must call."""
    base = describe_base(config.load)
    lora = LoraSettings.from_config(config)
    with own_output(config.save / LOCK_NAME, config.VERB), open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        config = settle_resume(config, mesh, report)
        config, data = _open_data(config, base, report)
        samples = data.samples
        model, seconds = _load(config, base, mesh, report, lora)
        base = loaded(model, base)
        optimizer = adapter_optimizer(model, config)
        peer_access = mesh.device.type == "cuda" and peer_access_fits(
            config,
            base,
            mesh.world_size,
            # The GPU's free memory, and what torch's allocator in this process has reserved.
            torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved(),
            torch.cuda.get_device_capability(),
        )
        tokens = config.micro_batch_size * config.rows_per_sample * config.seq_length
        most = samples.most if isinstance(samples, PackedSamples) else None
        captured = config.cuda_graphs and (most is None or most.pay(config.seq_length))
        objective = objective_of(config)
        with backward_of(
            model, tokens, captured=captured, peer_access=peer_access, most=most, objective=objective
        ) as backward:
            bad = BadSteps(config, mesh, report)
            refuses = bad.refuses if bad.is_active else None
            step = optimizer_step(model, optimizer, config.clip_grad, backward, refuses)
            if mesh.is_first and not config.resume:
                remove_leftovers(config.save)
            meter = _meter(config, base, mesh, config.save / METRICS)
            run = Run(config, mesh, report, model, data, meter, step, seconds, bad)
            if data.validation is not None:
                file = config.save / VALIDATION if mesh.is_first else None
                run.validation = Validation(
                    data.validation, config.micro_batch_size, report, file, objective, config.loss_name
                )
            load_init_adapter(config, base, model, report)
            if config.resume:
                run.start = resume_run(run, optimizer, config, base)
            prepare_references(run, config, base)
            _report_lora(run, config)
            outcome = Outcome(config, base, data, mesh, report, model.count_choices() if config.router_stats else None)
            outcome.start()
            report_disk_use(config, adapter_bytes(config, base, run.start), report)
            board = config.save / TENSORBOARD if config.tensorboard and mesh.is_first else None
            with (
                stop_requests(mesh) as stop,
                scalar_loggers(config.log_to, outcome.record, config.save, report, tensorboard=board) as write,
                RunCheckpoints(run, optimizer, config, base) as checkpoints,
                report.training(config.iterations, run.start) as run.view,
            ):
                checkpoints.prepare()
                _train_and_save(run, config, checkpoints, stop, write, outcome)
            _report_end(run, config, outcome, backward.num_retaken)


def pretrain(config: PretrainConfig) -> None:
    """Train all weights for a few iterations and save nothing. All ranks must call."""
    base = describe_base(config.load)
    lock = lock_file_of(config.metrics_file) if config.metrics_file is not None else None
    with own_output(lock, "pretrain"), open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        one_each = config.micro_batch_size * mesh.data_size
        config = dataclasses.replace(config, global_batch_size=config.global_batch_size or one_each)
        config, data = _open_data(config, base, report)
        model, seconds = _load(config, base, mesh, report, None)
        tokens = config.micro_batch_size * config.seq_length
        with backward_of(model, tokens, captured=config.cuda_graphs) as backward:
            step, how = _full_step(config, model, backward, steps_in_backward=config.global_batch_size == one_each)
            meter = _meter(config, base, mesh, config.metrics_file)
            run = Run(config, mesh, report, model, data, meter, step, seconds, BadSteps(config, mesh, report))
            report.say(f"Training all {base.architecture.num_parameters:,} parameters with {how}")
            with stop_requests(mesh) as stop, report.training(config.iterations, 0) as run.view:
                for metrics in _iterations(run, stop):
                    _show(run, metrics)
        report.done(f"Pretraining complete: {config.iterations} iterations in {run.meter.total_seconds:.1f} s")


def _open_data(config: ConfigT, base: BaseDescription, report: Report) -> tuple[ConfigT, TrainingData]:
    """Return the data, and the config with the iterations that --epochs are. All ranks must call."""
    data = open_data_everywhere(config, base, report)
    config = config.with_iterations(data.num_samples, config.global_batch_size)
    data.describe(config, report)
    return config, data


def _full_step(
    config: PretrainConfig, model: MixtralModel, backward: Backward, *, steps_in_backward: bool
) -> tuple[Step, str]:
    """Return the step over all weights that needs the least memory, and its name for the log."""
    if config.optimizer == "sgd" and steps_in_backward and config.clip_grad == 0:
        return SgdInBackward(model, config.weight_decay).step, "SGD within the backward pass"
    parameters = trainable(model)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
        how = "SGD; all gradients are held, for clipping or for several micro batches"
    else:
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        how = "AdamW"
    return optimizer_step(model, optimizer, config.clip_grad, backward), how


def _load(
    config: TrainingConfig, base: BaseDescription, mesh: Mesh, report: Report, lora: LoraSettings | None
) -> tuple[MixtralModel, float]:
    """Return the model and the seconds that loading took."""
    started = time.perf_counter()
    report.say(
        f"Loading {config.load} onto {mesh.world_size} × {mesh.device.type} as {mesh.layout}, "
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


def _train_and_save(
    run: Run,
    config: FinetuneConfig,
    checkpoints: RunCheckpoints,
    stop: StopRequest,
    write: Callable[[int, Mapping[str, float]], None],
    outcome: Outcome,
) -> None:
    saved = done = run.start
    _evaluate(run, config, done, stop, write, outcome)
    if done == 0:
        outcome.generations.write(run.model, done, stop.agreed, run.report)
        run.meter.restart()
    for metrics in _iterations(run, stop):
        done = metrics.iteration
        checkpoints.poll()
        if run.mesh.is_first and (done % config.log_interval == 0 or done == config.iterations):
            _show(run, metrics)
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
    checkpoints.finish()
    if done != saved:
        checkpoints.save(done, goes_on=False)
    run.last = done
    if done != run.start and not stop.agreed():
        outcome.generations.write(run.model, done, stop.agreed, run.report)


def _show(run: Run, metrics: IterationMetrics) -> None:
    """Show the figures of an iteration: in the view of a terminal, or as a line."""
    if run.view is not None:
        run.view.update(metrics.live_figures(_processor(run.mesh)))
    else:
        run.report.say(metrics.line(_processor(run.mesh)))


def _is_over(run: Run, config: FinetuneConfig) -> bool:
    """Return True on all ranks if --early-stopping-patience ends the run. All ranks must call."""
    if not config.early_stopping_patience:
        return False
    return everywhere(run.best.is_over(config.early_stopping_patience), run.mesh.device)


def _report_end(run: Run, config: FinetuneConfig, outcome: Outcome, num_retaken: int) -> None:
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
        validation=run.validation.results if run.validation is not None else (),
        last_iteration=done,
        train_iters=config.iterations,
        epochs=config.epochs,
        best=run.best,
        stopped_early=is_over and done < config.iterations,
    )
    if run.mesh.is_first:
        outcome.end(summary, num_retaken)
    if done < config.iterations and not is_over:
        run.report.warn(f"Stopped at iteration {done} of {config.iterations}, as requested; --resume continues it")
        return
    if done < config.iterations:
        run.report.say(
            f"Stopped early at iteration {done} of {config.iterations}: {run.best.evaluations()} "
            f"without a validation loss below {run.best.best_loss:.4f}, that of iteration {run.best.best_iteration}"
        )
    run.report.done(
        f"LoRA {config.WHAT} complete: {done} iterations in {format_seconds(run.meter.total_seconds)}, "
        f"adapter in {config.save}"
    )
    run.report.say(f"  {summary.line(_processor(run.mesh))}")
    if summary.validation is not None:
        run.report.say(f"  {summary.validation.line(config.save)}")
    best = config.save if summary.validation is None else summary.validation.best_adapter(config.save)
    run.report.say(f"  next: mixtral-run export --adapter {best} --output-path …")


def _evaluate(
    run: Run,
    config: FinetuneConfig,
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


def _iterations(run: Run, stop: StopRequest) -> Iterator[IterationMetrics]:
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


def _report_lora(run: Run, config: FinetuneConfig) -> None:
    architecture = run.model.architecture
    also = architecture.num_trained_also(config.train_also)
    count = architecture.num_adapter_parameters(config) + also
    total = architecture.num_parameters - also
    run.report.say("LoRA configuration:")
    run.report.say(
        f"  target modules: {', '.join(config.lora_target_modules)} ({EXPERTS_HAVE[config.expert_adapters]})"
    )
    lora = LoraSettings.from_config(config)
    scales = dict.fromkeys(f"{lora.of(module).scale:g}" for module in lora.target_modules)
    run.report.say(f"  {lora.describe()}, dropout {lora.dropout:g}, scale {' and '.join(scales)}")
    run.report.say(f"  trainable parameters: {count:,} of {total + count:,} ({count / (total + count):.4%})")


def _meter(config: TrainingConfig, base: BaseDescription, mesh: Mesh, file: Path | None) -> Meter:
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


def _processor(mesh: Mesh) -> str:
    return "GPU" if mesh.device.type == "cuda" else "process"

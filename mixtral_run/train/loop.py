"""The training loop: LoRA fine-tuning, and a few iterations of full training."""

from __future__ import annotations

import dataclasses

import torch

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.launch.stop_request import SAVING_CHECKPOINT, SAVING_NOTHING, stop_requests
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.planner.choose import peer_access_fits
from mixtral_run.results.run_files import METRICS, TENSORBOARD, VALIDATION
from mixtral_run.run_lock import LOCK_NAME, lock_file_of
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.init_adapter import load_init_adapter
from mixtral_run.train.checkpoints.newest_good import settle_resume
from mixtral_run.train.checkpoints.run_folder import check_shared, own_output, report_disk_use
from mixtral_run.train.checkpoints.saving import AdapterSaver
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.full.full_run import full_finetune, sharded_step
from mixtral_run.train.load_model import loaded
from mixtral_run.train.outcome.log_to import scalar_loggers
from mixtral_run.train.outcome.record import Outcome
from mixtral_run.train.preferences.prepare import objective_of, prepare_references
from mixtral_run.train.preflight import adapter_bytes
from mixtral_run.train.run import Run
from mixtral_run.train.run_checkpoints import RunCheckpoints, describe_lora, remove_leftovers, resume_run
from mixtral_run.train.run_loop import (
    Ending,
    load_model,
    meter_of,
    open_data,
    report_end,
    show,
    train_and_save,
    train_iterations,
)
from mixtral_run.train.steps.bad_steps import BadSteps
from mixtral_run.train.steps.cuda_graph import backward_of
from mixtral_run.train.steps.eager_optimizer import SGD
from mixtral_run.train.steps.exchange import describe_exchange
from mixtral_run.train.steps.sgd_in_backward import SgdInBackward
from mixtral_run.train.steps.step import Backward, Step, adapter_optimizer, optimizer_step, trainable
from mixtral_run.train.validation import Validation
from mixtral_run.weights.manifest.describe import describe_base

EXPERTS_HAVE = {"each": "one adapter per expert", "shared": "one adapter for all experts of a layer"}


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune with LoRA, on answers or on preferences, and save adapters. All ranks must call."""
    base = describe_base(config.load)
    lora = LoraSettings.from_config(config)
    with own_output(config.save / LOCK_NAME, config.VERB), open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        check_shared(config.save, mesh)
        config = settle_resume(config, mesh, report)
        config, data = open_data(config, base, report)
        samples = data.samples
        model, seconds = load_model(config, base, mesh, report, lora)
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
        most = samples.most if isinstance(samples, PackedSamples | PreferenceSamples) else None
        captured = config.cuda_graphs and (most is None or most.pay(config.seq_length))
        objective = objective_of(config)
        with backward_of(
            model, tokens, captured=captured, peer_access=peer_access, most=most, objective=objective
        ) as backward:
            bad = BadSteps(config, mesh, report)
            refuses = bad.refuses if bad.is_active else None
            step = optimizer_step(model, optimizer, config.max_norm, backward, refuses)
            if mesh.is_first and not config.resume:
                remove_leftovers(config.save)
            meter = meter_of(config, base, mesh, config.save / METRICS)
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
            when = describe_exchange(model, backward.exchange)
            if when is not None:
                report.say(when)
            counts = model.count_choices() if config.router_stats else None
            outcome = Outcome(config, base, data, mesh, report, counts, run.former)
            outcome.start()
            report_disk_use(config, adapter_bytes(config, base, run.start), report)
            saver = AdapterSaver(model, optimizer, config.save, config.distributed_timeout_minutes)
            board = config.save / TENSORBOARD if config.tensorboard and mesh.is_first else None
            with (
                stop_requests(mesh, SAVING_CHECKPOINT) as stop,
                scalar_loggers(config.log_to, outcome.record, config.save, report, tensorboard=board) as write,
                RunCheckpoints(run, saver, config, base, describe_lora(config)) as checkpoints,
                report.training(config.iterations, run.start) as run.view,
            ):
                checkpoints.prepare()
                train_and_save(run, config, checkpoints, stop, write, outcome)
            next_words = "export --adapter {} --output-path …"
            ending = Ending(f"LoRA {config.WHAT}", "adapter", next_words)
            report_end(run, config, outcome, ending, backward.num_retaken)


def pretrain(config: PretrainConfig) -> None:
    """Train all weights: with --save full fine-tuning, else a few iterations. All ranks must call."""
    if config.save is not None:
        full_finetune(config)
        return
    base = describe_base(config.load)
    lock = lock_file_of(config.metrics_file) if config.metrics_file is not None else None
    with own_output(lock, "pretrain"), open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        one_each = config.micro_batch_size * mesh.data_size
        config = dataclasses.replace(config, global_batch_size=config.global_batch_size or one_each)
        config, data = open_data(config, base, report)
        model, seconds = load_model(config, base, mesh, report, None)
        tokens = config.micro_batch_size * config.seq_length
        with backward_of(model, tokens, captured=config.cuda_graphs and not config.uses_adamw) as backward:
            bad = BadSteps(config, mesh, report)
            if config.uses_adamw:
                step, how = sharded_step(config, model, bad)[0], "AdamW, with its state sharded"
            else:
                step, how = _sgd_step(config, model, backward, steps_in_backward=config.global_batch_size == one_each)
            meter = meter_of(config, base, mesh, config.metrics_file)
            run = Run(config, mesh, report, model, data, meter, step, seconds, bad)
            report.say(f"Training all {base.architecture.num_parameters:,} parameters with {how}")
            view = report.training(config.iterations, 0)
            with stop_requests(mesh, SAVING_NOTHING) as stop, view as run.view:
                for metrics in train_iterations(run, stop):
                    show(run, metrics)
        report.done(
            f"Pretraining complete: {config.iterations} iteration{'s' * (config.iterations != 1)} in "
            f"{run.meter.total_seconds:.1f} s"
        )


def _sgd_step(
    config: PretrainConfig, model: MixtralModel, backward: Backward, *, steps_in_backward: bool
) -> tuple[Step, str]:
    """Return the step of SGD over all weights that needs the least memory, and its name for the log."""
    if steps_in_backward and config.max_norm == 0:
        return SgdInBackward(model, config.weight_decay).step, "SGD within the backward pass"
    optimizer = SGD(trainable(model), lr=config.lr, weight_decay=config.weight_decay)
    how = "SGD; all gradients are held, for clipping or for several micro batches"
    return optimizer_step(model, optimizer, config.max_norm, backward), how


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

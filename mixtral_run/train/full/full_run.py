"""Full fine-tuning, `pretrain --save`: all weights train, and every checkpoint is a base that any verb reads."""

from __future__ import annotations

import dataclasses

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.launch.stop_request import SAVING_CHECKPOINT, stop_requests
from mixtral_run.model.allocator import growing_segments
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.results.run_files import METRICS, TENSORBOARD, VALIDATION
from mixtral_run.run_lock import LOCK_NAME
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.newest_good import settle_resume
from mixtral_run.train.checkpoints.resume_checks import check_full_resume, full_checkpoint_bytes
from mixtral_run.train.checkpoints.run_folder import check_shared, own_output, report_disk_use
from mixtral_run.train.full.full_step import full_step
from mixtral_run.train.full.resume import resume_full
from mixtral_run.train.full.saving import FullSaver
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.train.load_model import loaded
from mixtral_run.train.outcome.log_to import scalar_loggers
from mixtral_run.train.outcome.record import Outcome
from mixtral_run.train.run import Run
from mixtral_run.train.run_checkpoints import RunCheckpoints, remove_leftovers
from mixtral_run.train.run_loop import Ending, load_model, meter_of, open_data, report_end, train_and_save
from mixtral_run.train.steps.bad_steps import BadSteps
from mixtral_run.train.steps.step import Step
from mixtral_run.train.validation import Validation
from mixtral_run.weights.io.atomic_folder import GIB
from mixtral_run.weights.manifest.describe import BaseDescription, describe_base

ENDING = Ending("Full fine-tuning", "model", "convert --from-megatron {} --output-path …")


def full_finetune(config: PretrainConfig) -> None:
    """Train all weights with AdamW, evaluate, save and resume. All ranks must call."""
    base = describe_base(config.load)
    with own_output(config.folder / LOCK_NAME, config.VERB), open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        check_shared(config.folder, mesh)
        config = settle_resume(config, mesh, report)
        one_each = config.micro_batch_size * mesh.data_size
        config = dataclasses.replace(config, global_batch_size=config.global_batch_size or one_each)
        config, data = open_data(config, base, report)
        if config.resume:
            check_full_resume(config, base)
        # The weights of a resumed run are those of its checkpoint.
        weights = describe_base(config.folder) if config.resume else base
        model, seconds = load_model(config, weights, mesh, report, None)
        base = base if config.resume else loaded(model, base)
        bad = BadSteps(config, mesh, report)
        step, optimizer = sharded_step(config, model, bad)
        if mesh.is_first and not config.resume:
            remove_leftovers(config.folder)
        meter = meter_of(config, base, mesh, config.folder / METRICS)
        run = Run(config, mesh, report, model, data, meter, step, seconds, bad)
        if data.validation is not None:
            file = config.folder / VALIDATION if mesh.is_first else None
            run.validation = Validation(data.validation, config.micro_batch_size, report, file)
        if config.resume:
            run.start = resume_full(run, optimizer, config, base)
        _report_full(run, optimizer, config)
        counts = model.count_choices() if config.router_stats else None
        outcome = Outcome(config, base, data, mesh, report, counts, run.former)
        outcome.start()
        report_disk_use(config, full_checkpoint_bytes(config, base, run.start), report)
        with growing_segments(mesh.device):
            _train(run, config, outcome, optimizer, base)
        report_end(run, config, outcome, ENDING)


def _train(run: Run, config: PretrainConfig, outcome: Outcome, optimizer: ShardedAdamW, base: BaseDescription) -> None:
    mesh, report = run.mesh, run.report
    board = config.folder / TENSORBOARD if config.tensorboard and mesh.is_first else None
    saver = FullSaver(run.model, optimizer, config.folder, config.distributed_timeout_minutes)
    source = {"source": base.hf_model} if base.hf_model is not None else {}
    with (
        stop_requests(mesh, SAVING_CHECKPOINT) as stop,
        scalar_loggers(config.log_to, outcome.record, config.folder, report, tensorboard=board) as write,
        RunCheckpoints(run, saver, config, base, source) as checkpoints,
        report.training(config.iterations, run.start) as run.view,
    ):
        checkpoints.prepare()
        train_and_save(run, config, checkpoints, stop, write, outcome)


def sharded_step(config: PretrainConfig, model: MixtralModel, bad: BadSteps) -> tuple[Step, ShardedAdamW]:
    """Return a step of AdamW over all weights, which takes no bad step, and the optimizer."""
    optimizer = ShardedAdamW(model, config.weight_decay, offload=config.offload_optimizer)
    if has_several_micro_batches(config, model.mesh):
        optimizer.accumulate_in_fp32()
    return full_step(model, optimizer, config.max_norm, bad.refuses), optimizer


def has_several_micro_batches(config: PretrainConfig, mesh: Mesh) -> bool:
    """Return True if a process adds up the gradients of several micro batches in a step."""
    return config.global_batch_size > config.micro_batch_size * mesh.data_size


def _report_full(run: Run, optimizer: ShardedAdamW, config: PretrainConfig) -> None:
    mesh, place = run.mesh, "in host memory" if config.offload_optimizer else "on the device"
    run.report.say(
        f"Training all {run.model.architecture.num_parameters:,} parameters with AdamW; its state takes "
        f"{optimizer.num_state_bytes / GIB:,.2f} GiB of the first process {place}, shared among "
        f"{mesh.expert_data_group.size()} for experts and {mesh.data_group.size()} for other weights"
    )

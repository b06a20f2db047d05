"""Checkpoints of a run: save, resume, and what they record of the run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from mixtral_run.config.training import FinetuneConfig
from mixtral_run.model.lora_settings import LoraSettings
from mixtral_run.train.checkpoints.checkpoint import load_adapter, load_optimizer, save_adapter
from mixtral_run.train.checkpoints.random_state import restore_random_state
from mixtral_run.train.checkpoints.run_folder import (
    drop_later_lines,
    growing_files,
    remove_old_checkpoints,
)
from mixtral_run.train.early_stopping import BestLoss
from mixtral_run.train.preflight import check_resume, leftovers
from mixtral_run.train.run import Run
from mixtral_run.weights.manifest.adapter_files import report_without_checksums
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription
from mixtral_run.weights.manifest.run_state import RunState

ORDER_SETTINGS = (
    "data_path",
    "chat_template",
    "data_format",
    "field",
    "skip_bad_examples",
    "valid_fraction",
    "mock_data",
    "pack",
    "seq_length",
    "global_batch_size",
    "seed",
)
"""Settings that determine the order of samples: if they change, a resumed run may repeat or skip some."""


def describe(run: Run, config: FinetuneConfig, base: BaseDescription) -> dict[str, object]:
    """Return what a checkpoint's mixtral_run.json says about the run so far."""
    return {
        "dtype": "float32",
        "lora": LoraSettings.from_config(config).to_mapping(),
        "base": {"fingerprint": base.fingerprint, "path": str(base.folder.resolve())},
        "training": config.to_mapping(),
        "data_sha256": run.data.sha256,
        "chat_template": run.data.chat_template,
        "validation": run.best.to_mapping(),
    }


def save_run(
    run: Run,
    optimizer: torch.optim.Optimizer,
    config: FinetuneConfig,
    base: BaseDescription,
    iteration: int,
) -> None:
    """Save the adapter, the optimizer and the state of the run, and remove old checkpoints. All ranks must call."""
    started = time.perf_counter()
    state = RunState(
        optimizer_steps=run.bad_steps.num_taken,
        num_skipped=run.bad_steps.num_skipped,
        recent_losses=run.bad_steps.recent,
        validation_loss=run.validation.loss_at(iteration) if run.validation is not None else None,
        run_files=growing_files(config.save) if run.mesh.is_first else {},
    )
    description = describe(run, config, base)
    folder = save_adapter(
        run.model, optimizer, config.save, iteration, description, state=state, tokenizer=base.tokenizer
    )
    run.report.say(f"saved {folder} in {time.perf_counter() - started:.1f} s")
    if run.mesh.is_first:
        remove_old_checkpoints(config.save, config.keep_last, config.keep_best, run.report)


def resume_run(run: Run, optimizer: torch.optim.Optimizer, config: FinetuneConfig, base: BaseDescription) -> int:
    """Load the newest checkpoint and the state of the run. Return its iteration. All ranks must call."""
    adapter = check_resume(config, base)
    report_without_checksums(adapter.files, adapter.folder, run.report)
    load_adapter(run.model, adapter)
    load_optimizer(run.model, optimizer, adapter)
    steps = adapter.iteration if adapter.state.optimizer_steps is None else adapter.state.optimizer_steps
    run.bad_steps.restore(adapter.state.recent_losses, steps, adapter.state.num_skipped)
    if run.mesh.is_first:
        drop_later_lines(config.save, adapter.iteration, adapter.state.run_files, run.report)
    other_dropout = restore_random_state(adapter.folder, run.mesh)
    if other_dropout is not None and config.lora_dropout:
        run.report.warn(f"Dropout differs from that of a run without interruption: {other_dropout}")
    run.best = BestLoss.from_mapping(adapter.validation)
    run.report.say(f"Resuming from {adapter.folder}, iteration {adapter.iteration}")
    changed = changed_order(config, adapter, run.data.sha256)
    if changed:
        run.report.warn(
            f"Samples may repeat or be skipped, because the data or its order changed: {', '.join(changed)}"
        )
    return adapter.iteration


def changed_order(config: FinetuneConfig, adapter: AdapterDescription, data_sha256: str | None) -> list[str]:
    """Return the settings that determine the order of samples and have changed since the run stopped."""
    now, before = config.to_mapping(), config.with_current_names(adapter.training)
    changed = [
        f"--{name.replace('_', '-')} {now[name]} (was {before[name]})"
        for name in ORDER_SETTINGS
        if before.get(name, now[name]) != now[name]
    ]
    is_same_data = data_sha256 is None or adapter.data_sha256 in (None, data_sha256)
    if not is_same_data and before.get("data_path", now["data_path"]) == now["data_path"]:
        changed.append(f"--data-path {' '.join(config.data_path)} (its content has changed)")
    return changed


def remove_leftovers(save: Path) -> None:
    """Remove the files of a run that ended before its first checkpoint."""
    if (save / LATEST).exists() or not save.is_dir():
        return
    for path in leftovers(save):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

"""Checkpoints of a run: save, resume, and what they record of the run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtral_run.config.fields import flag_of
from mixtral_run.config.former_settings import FORMER_SETTINGS, FormerSettings, to_values
from mixtral_run.config.lora import has_frozen_start
from mixtral_run.config.verbs.align import AlignConfig, loss_of
from mixtral_run.config.verbs.training import FinetuneConfig, RunConfig
from mixtral_run.launch.processes import SHUTDOWN_SECONDS
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.parallel.mesh import everywhere
from mixtral_run.planner.memory_model import USABLE_OF_HOST
from mixtral_run.train.checkpoints.checkpoint import load_adapter, load_optimizer
from mixtral_run.train.checkpoints.random_state import restore_random_state
from mixtral_run.train.checkpoints.run_folder import (
    drop_later_lines,
    growing_files,
    remove_old_checkpoints,
    remove_partial_checkpoints,
    saves_before_the_end,
)
from mixtral_run.train.checkpoints.saving import Saver, SaveRequest
from mixtral_run.train.early_stopping import BestLoss
from mixtral_run.train.preflight import check_resume, leftovers
from mixtral_run.train.run import Run
from mixtral_run.weights.adapter.model_card import SETTINGS as CARD_SETTINGS
from mixtral_run.weights.io.atomic_folder import GIB
from mixtral_run.weights.manifest.adapter_files import report_without_checksums
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription, TrainedDescription
from mixtral_run.weights.manifest.run_state import RunState

Saved = AdapterDescription | TrainedDescription

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
LOSS_SETTINGS = (
    "beta", "reference", "loss_type", "label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight",
    "router_aux_loss",
)  # fmt: skip
"""Settings that determine the loss. --init-adapter does as well where it is the reference of align."""
PRECISION_SETTINGS = ("base_precision", "attention_precision", "dtype")
"""Settings of the form of the frozen weights, whose rounding is a part of the loss, and of align's reference."""
REFERENCE_SETTINGS = (*PRECISION_SETTINGS, "reference", "init_adapter", "pack", "seq_length")
"""Settings that determine what align's reference says of a sample."""
DRAW_SETTINGS = ("micro_batch_size", "expert_chunks")
"""Settings that determine the order in which dropout draws its numbers, next to the layout."""

RECORDED_SETTINGS = ("lora_dropout", *(name for name in CARD_SETTINGS if name not in ("train_iters", "epochs")))
"""Settings that the records of a run name with their former values. The length of a run may grow without a change."""

LONGEST_BEFORE_ANOTHER = SHUTDOWN_SECONDS / 2
"""Seconds of a save that a stop came into, up to which the last iteration is saved as well."""


def describe_lora(config: FinetuneConfig) -> dict[str, object]:
    """Return what the mixtral_run.json of an adapter says about it."""
    return {"dtype": "float32", "lora": LoraSettings.from_config(config).to_mapping()}


def describe(run: Run, config: RunConfig, base: BaseDescription) -> dict[str, object]:
    """Return what a checkpoint's mixtral_run.json says about the run so far."""
    return {
        "base": {"fingerprint": base.fingerprint, "path": str(base.folder.resolve())},
        "training": config.to_mapping(),
        "data_sha256": run.data.sha256,
        "chat_template": run.data.chat_template,
        "validation": run.best.to_mapping(),
        **({FORMER_SETTINGS: to_values(run.former)} if run.former else {}),
    }


class RunCheckpoints:
    """Saves the checkpoints of a run, in the background where the training continues. All ranks must call.

    A context, which completes a save in the background even if the training fails.
    """

    def __init__(
        self, run: Run, saver: Saver, config: RunConfig, base: BaseDescription, more: Mapping[str, object]
    ) -> None:
        """more: values of each checkpoint's manifest, next to those of `describe`."""
        self._run, self._config, self._base, self._more = run, config, base, more
        self._saver = saver
        self._pending: tuple[int, float] | None = None
        self._removed: list[Path] = []

    def __enter__(self) -> RunCheckpoints:
        self._saver.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._pending is not None and self._saver.waits_after(error):
            self._run.report.warn(
                f"The training has failed. The run ends when the checkpoint of iteration {self._pending[0]} is written"
            )
        self._saver.__exit__(kind, error, trace)

    def prepare(self) -> None:
        """Prepare for saves in the background, if they are wanted and the run saves before its end."""
        if not self._config.save_in_background or not saves_before_the_end(self._config, self._run.start):
            return
        gib = f"{self._saver.prepare_background() / GIB:,.2f} GiB"
        if self._saver.can_save_in_background:
            self._run.report.say(f"Checkpoints are saved in the background; the copy takes {gib} of host memory")
        elif self._saver.copy_problem is not None:
            self._run.report.warn(
                f"The training waits for each save: the copy for saves in the background, {gib} over all hosts, could "
                f"not be allocated ({self._saver.copy_problem})"
            )
        else:
            self._run.report.warn(
                f"The training waits for each save: a copy for saves in the background would take {gib} over all "
                f"hosts, and may take {USABLE_OF_HOST:.0%} of the memory that is free on each"
            )

    def plan_ahead(self) -> None:
        """Begin to plan the next save beside the training, after the first iteration of this process."""
        self._saver.plan_ahead()

    def save(self, iteration: int, *, goes_on: bool) -> None:
        """Save the adapter, the optimizer and the state of the run, and remove old checkpoints.

        goes_on: True if the training continues; the save may then be in the background.
        """
        started = time.perf_counter()
        self.finish()
        request = self._request(iteration)
        if goes_on and self._saver.can_save_in_background:
            self._saver.save_in_background(request)
            # With the wait for the save before, which may be most of it.
            self._pending = iteration, time.perf_counter() - started
            return
        self._saver.save(request)
        self._report(iteration, f"in {time.perf_counter() - started:.1f} s")

    def poll(self) -> None:
        """Report a save in the background that is complete, or raise its error."""
        self._report_pending(self._saver.poll())

    def finish(self) -> float | None:
        """Wait for a save in the background, and report it or raise its error. Return its seconds on this rank."""
        seconds = self._saver.finish()
        self._report_pending(seconds)
        return seconds

    def finish_at_end(self, last: int, *, is_stopped: bool) -> bool:
        """Wait for a save in the background. Return True if the last iteration is to be saved, on all ranks alike.

        After a stop that came during a long save there may be no time for two: the second is left out, as the job would
        be killed before it is complete.
        """
        pending = self._pending
        seconds = self.finish()
        if not is_stopped or pending is None or pending[0] == last:
            return True
        if everywhere(seconds is None or seconds <= LONGEST_BEFORE_ANOTHER, self._run.mesh.device):
            return True
        self._run.report.warn(
            f"Iteration {last} is not saved: a save takes more than {LONGEST_BEFORE_ANOTHER:.0f} s, and the job may be "
            f"killed {SHUTDOWN_SECONDS} s after a stop. The newest checkpoint is that of iteration {pending[0]}"
        )
        return False

    def _report_pending(self, seconds: float | None) -> None:
        if seconds is not None and self._pending is not None:
            iteration, delay = self._pending
            self._pending = None
            self._report(iteration, f"in {seconds:.1f} s in the background, which delayed a step by {delay:.2f} s")

    def _report(self, iteration: int, how: str) -> None:
        self._run.report.say(f"saved {self._config.folder / f'iter_{iteration:07d}'} {how}")
        for folder in self._removed:
            self._run.report.say(f"removed {folder}")
        self._removed.clear()

    def _request(self, iteration: int) -> SaveRequest:
        run, config = self._run, self._config
        state = RunState(
            optimizer_steps=run.bad_steps.num_taken,
            num_skipped=run.bad_steps.num_skipped,
            recent_losses=run.bad_steps.recent,
            validation_loss=run.validation.loss_at(iteration) if run.validation is not None else None,
            run_files=growing_files(config.folder) if run.mesh.is_first else {},
        )
        description = {**describe(run, config, self._base), **self._more}
        return SaveRequest(iteration, description, state, self._base.tokenizer, self._remove_old)

    def _remove_old(self) -> None:
        self._removed += remove_old_checkpoints(self._config.folder, self._config.keep_last, self._config.keep_best)


def resume_run(run: Run, optimizer: torch.optim.Optimizer, config: FinetuneConfig, base: BaseDescription) -> int:
    """Load the newest checkpoint and the state of the run. Return its iteration. All ranks must call."""
    adapter = check_resume(config, base)
    report_without_checksums(adapter.files, adapter.folder, run.report)
    load_adapter(run.model, adapter)
    load_optimizer(run.model, optimizer, adapter)
    other_dropout = continue_run(run, config, adapter)
    if other_dropout is not None and config.lora_dropout:
        run.report.warn(f"Dropout differs from that of a run without interruption: {other_dropout}")
    if other_loss := loss_warning(config, adapter):
        run.report.warn(other_loss)
    return adapter.iteration


def continue_run(run: Run, config: RunConfig, adapter: Saved) -> str | None:
    """Set the state of a run, and of its files, to that of a checkpoint. All ranks must call.

    Returns why the random numbers are not those of the checkpoint, or None.
    """
    steps = adapter.iteration if adapter.state.optimizer_steps is None else adapter.state.optimizer_steps
    run.bad_steps.restore(adapter.state.recent_losses, steps, adapter.state.num_skipped)
    if run.mesh.is_first:
        drop_later_lines(config.folder, adapter.iteration, adapter.state.run_files, run.report)
        remove_partial_checkpoints(config.folder)
    other_dropout = restore_random_state(adapter.folder, run.mesh) or changed_draws(config, adapter)
    run.best = BestLoss.from_mapping(adapter.validation)
    run.former = (*adapter.former, *former_settings(config, adapter))
    run.report.say(f"Resuming from {adapter.folder}, iteration {adapter.iteration}")
    changed = changed_order(config, adapter, run.data.sha256)
    if changed:
        run.report.warn(
            f"Samples may repeat or be skipped, because the data or its order changed: {', '.join(changed)}"
        )
    return other_dropout


def changed_order(config: RunConfig, adapter: Saved, data_sha256: str | None) -> list[str]:
    """Return the settings that determine the order of samples and have changed since the run stopped."""
    now, before = config.to_mapping(), _settings_before(config, adapter)
    changed = _changed(config, adapter, ORDER_SETTINGS)
    is_same_data = data_sha256 is None or adapter.data_sha256 in (None, data_sha256)
    if not is_same_data and before.get("data_path", now["data_path"]) == now["data_path"]:
        changed.append(f"--data-path {' '.join(config.data_path)} (its content has changed)")
    return changed


def changed_loss(config: RunConfig, adapter: Saved) -> list[str]:
    """Return the settings of the loss that have changed since the run stopped, each with its former value."""
    names: tuple[str, ...] = LOSS_SETTINGS
    if isinstance(config, AlignConfig):
        if loss_of(config.to_mapping()) == loss_of(config.with_current_names(adapter.training)):
            # At most a default was written out.
            names = ()
        names = (*names, "init_adapter") if config.has_reference else names
    found = _changed(config, adapter, (*names, *PRECISION_SETTINGS))
    # Whether a dtype of auto is another one depends on the base and the processor.
    return [each for each in found if not each.startswith("--dtype ") or "auto" not in each]


def loss_warning(config: RunConfig, adapter: Saved) -> str | None:
    """Return the warning about a loss that changed since the run stopped, and about what still is of the former one."""
    changed = changed_loss(config, adapter)
    if not changed:
        return None
    parts = [f"The loss is another one than before: {', '.join(changed)}"]
    best = BestLoss.from_mapping(adapter.validation)
    if best.best_iteration is not None:
        flags = ("--early-stopping-patience", config.early_stopping_patience), ("--keep-best", config.keep_best)
        users = [flag for flag, is_used in flags if is_used]
        compared = f", and {' and '.join(users)} {'compare' if len(users) > 1 else 'compares'} with it" if users else ""
        parts.append(
            f"The lowest validation loss so far, {best.best_loss:.4f} of iteration {best.best_iteration}, is of the "
            f"former one{compared}"
        )
    is_other = bool(_changed(config, adapter, ("base_precision", "attention_precision")))
    if isinstance(config, FinetuneConfig) and has_frozen_start(config) and is_other:
        parts.append(f"The start of --init-lora {config.init_lora} stays that of the former precision")
    return ". ".join(parts)


def former_settings(config: RunConfig, adapter: Saved) -> tuple[FormerSettings, ...]:
    """Return the settings that the run had up to the checkpoint, as far as they changed and decide about the result."""
    now, before = config.to_mapping(), _settings_before(config, adapter)
    names = _different(now, before, (*RECORDED_SETTINGS, *LOSS_SETTINGS, *REFERENCE_SETTINGS))
    return (FormerSettings(adapter.iteration, {name: before[name] for name in names}),) if names else ()


def changed_reference(run: Run, config: FinetuneConfig) -> str | None:
    """Return the settings that give align another reference than before this start of the run; None if none does."""
    newest = run.former[-1] if run.former and run.start and run.former[-1].iteration == run.start else None
    names = [name for name in REFERENCE_SETTINGS if newest is not None and name in newest.settings]
    return ", ".join(_lines(config.to_mapping(), newest.settings, names)) if newest is not None and names else None


def changed_draws(config: RunConfig, adapter: Saved) -> str | None:
    """Return the settings that decide which tokens a random number is for, and have changed; None if none has."""
    return ", ".join(_changed(config, adapter, DRAW_SETTINGS)) or None


def _changed(config: RunConfig, adapter: Saved, names: Sequence[str]) -> list[str]:
    """Return those of the settings that have changed since the run stopped."""
    now, before = config.to_mapping(), _settings_before(config, adapter)
    return _lines(now, before, _different(now, before, names))


def _settings_before(config: RunConfig, adapter: Saved) -> dict[str, Any]:
    """Return the settings of the run that saved a checkpoint; empty if the checkpoint does not record them.

    One that the record lacks was added to the kit later, and had its default: that is what the kit did before it.
    """
    recorded = config.with_current_names(adapter.training)
    return {**config.defaults(), **recorded} if recorded else {}


def _different(now: Mapping[str, Any], before: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return those of the names whose values differ, each once."""

    def value(settings: Mapping[str, Any], name: str) -> Any:
        return settings[name] or 1 if name == "expert_chunks" else settings[name]

    known = [name for name in dict.fromkeys(names) if name in now and name in before]
    return [name for name in known if value(now, name) != value(before, name)]


def _lines(now: Mapping[str, Any], before: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{flag_of(name)} {now[name]} (was {before[name]})" for name in names]


def remove_leftovers(save: Path) -> None:
    """Remove the files of a run that ended before its first checkpoint."""
    if (save / LATEST).exists() or not save.is_dir():
        return
    for path in leftovers(save):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

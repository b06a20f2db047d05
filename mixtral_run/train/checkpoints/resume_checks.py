"""Checks of --resume before any process starts, and the size of checkpoints of full fine-tuning. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import RunConfig
from mixtral_run.errors import ConfigError
from mixtral_run.train.checkpoints.run_folder import num_checkpoints
from mixtral_run.train.early_stopping import BestLoss
from mixtral_run.weights.manifest.describe import (
    BaseDescription,
    TrainedDescription,
    check_same_start,
    describe_trained,
)

STATE_BYTES = 12
"""Of each weight in a checkpoint, next to the weight itself: its master and AdamW's two moments, in fp32."""


class RunCompleteError(ConfigError):
    """--resume finds that the run has reached its end: nothing is wrong, and there is nothing to do."""


def check_not_complete(config: RunConfig, folder: Path, iteration: int, validation: Mapping[str, Any]) -> None:
    """Raise RunCompleteError if a checkpoint is the end of the run.

    Args:
        config: of the run that is to continue.
        folder: of the checkpoint's iteration.
        iteration: the number of finished iterations.
        validation: what the checkpoint records of evaluations.
    """
    best = BestLoss.from_mapping(validation)
    if best.is_over(config.early_stopping_patience):
        raise RunCompleteError(
            f"The run is complete: it stopped early, after {best.evaluations()} without a loss "
            f"below that of iteration {best.best_iteration}. A larger --early-stopping-patience trains on",
            where=str(folder),
        )
    if config.knows_iterations and iteration >= config.iterations:
        length = "--epochs" if config.epochs is not None else "--train-iters"
        raise RunCompleteError(
            f"The run is complete: {folder} is iteration {iteration} of {config.iterations}. A larger "
            f"{length} trains on",
            where=str(folder),
        )


def weight_size(config: PretrainConfig, base: BaseDescription) -> int:
    """Return the bytes of a weight in the model's dtype; 4 where the dtype of --dtype auto depends on the device."""
    return {"bf16": 2, "fp32": 4}.get(config.dtype, 2 if base.dtype == "bfloat16" else 4)


def full_checkpoint_bytes(config: PretrainConfig, base: BaseDescription, start: int) -> int:
    """Return the bytes of the checkpoints that are there at once. start: as in `num_checkpoints`."""
    each = base.architecture.num_parameters * (weight_size(config, base) + STATE_BYTES)
    return each * num_checkpoints(config, start)


def check_full_resume(
    config: PretrainConfig, base: BaseDescription, trained: TrainedDescription | None = None
) -> TrainedDescription:
    """Return the checkpoint that --resume continues from: `trained`, or the newest in --save.

    Raises ConfigError or WeightsError if it cannot continue, RunCompleteError if the run has reached its end.
    """
    trained = trained or describe_trained(config.folder)
    check_same_start(trained, base)
    check_not_complete(config, trained.folder, trained.iteration, trained.validation)
    return trained

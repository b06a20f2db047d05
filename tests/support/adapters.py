"""Save an adapter as `finetune` does at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.train.checkpoints.saving import AdapterSaver, SaveRequest


def save_adapter(
    model: MixtralModel, optimizer: torch.optim.Optimizer, folder: Path, iteration: int, description: Mapping[str, Any]
) -> Path:
    """Write FOLDER/iter_… and return it. All ranks must call."""
    return AdapterSaver(model, optimizer, folder).save(SaveRequest(iteration, description))

"""Check of an adapter and of its last update, so that no checkpoint with spoiled numbers gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtral_run.errors import TrainingError, shortened
from mixtral_run.model.mixtral import MixtralModel

LARGEST_VALUE = 1e4
"""Largest absolute value of an adapter's parameter. Trained ones are below 10: A begins below 1, B at zero."""
LARGEST_UPDATE = 100.0
"""Largest update of AdamW, as a multiple of the learning rate. With betas of 0.9 and 0.999 it cannot exceed 7.3: the
first moment is at most that multiple of the root of the second one, by the Cauchy-Schwarz inequality."""


def check_sound(model: MixtralModel, optimizer: torch.optim.Optimizer, folder: Path, iteration: int) -> None:
    """Raise TrainingError on all ranks if a parameter of the optimizer, or its last update, is spoiled.

    Spoiled: NaN, infinite, or larger than any training makes it. All ranks must call.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems_of(model, optimizer))
    problems = [line for lines in gathered for line in lines]
    if problems:
        raise TrainingError(
            f"The adapter of iteration {iteration} is spoiled and is not saved.",
            where=str(folder),
            problems=shortened(problems),
            next_command="the same command with --resume, which continues from the last checkpoint, and a smaller "
            "--lr, or --max-loss-ratio with --skip-bad-steps",
        )


def problems_of(model: MixtralModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return a line for each of this rank's parameters that is spoiled, or whose last update is. Rank-local."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if not parameters:
        return []
    # One transfer from the GPU for all of them.
    rows = torch.stack([_largest(each, optimizer.state.get(each, {})) for each in parameters]).tolist()
    problems = []
    for parameter, (value, update) in zip(parameters, rows, strict=True):
        for what, found, limit in (("values", value, LARGEST_VALUE), ("last update", update, LARGEST_UPDATE)):
            if not found <= limit:  # NaN exceeds every limit
                unit = " × the learning rate" if what == "last update" else ""
                problems.append(f"{names[id(parameter)]}: {what} up to {limit:g}{unit} expected; found {found:g}")
    return problems


def _largest(parameter: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """Return the largest absolute value of a parameter and of its last update, fp32 [2]; NaN if there is one."""
    value = parameter.detach().abs().max().float()
    if "exp_avg" not in state:
        return torch.stack((value, torch.zeros_like(value)))
    update = (state["exp_avg"].abs() / (state["exp_avg_sq"].sqrt() + 1e-8)).max().float()
    return torch.stack((value, update))

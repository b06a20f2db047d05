"""Check of an adapter and of its last update, so that no checkpoint with spoiled numbers gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtral_run.errors import TrainingError, shortened
from mixtral_run.train.checkpoints.adapter_shards import ParameterState

LARGEST_VALUE = 1e4
"""Largest absolute value of an adapter's parameter. Trained ones are below 10: A begins below 1, B at zero."""
LARGEST_UPDATE = 100.0
"""Largest update of AdamW, as a multiple of the learning rate. With betas of 0.9 and 0.999 it cannot exceed 7.3: the
first moment is at most that multiple of the root of the second one, by the Cauchy-Schwarz inequality."""


def check_sound(
    states: Sequence[ParameterState],
    folder: Path,
    iteration: int,
    group: dist.ProcessGroup | None = None,
    what: str = "adapter",
) -> None:
    """Raise TrainingError on all ranks if a parameter, or its last update, is spoiled. All ranks must call.

    Spoiled: NaN, infinite, or larger than any training makes it. states: those that this rank writes. group: of all
    ranks; None for the group of the training. what: what is saved, for the message.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems_of(states), group=group)
    problems = list(dict.fromkeys(line for lines in gathered for line in lines))
    if problems:
        raise TrainingError(
            f"The {what} of iteration {iteration} is spoiled and is not saved.",
            where=str(folder),
            problems=shortened(problems),
            next_command="the same command with --resume, which continues from the last checkpoint, and a smaller "
            "--lr, or --max-loss-ratio with --skip-bad-steps",
        )


def problems_of(states: Sequence[ParameterState]) -> list[str]:
    """Return a line for each parameter that is spoiled, or whose last update is. Rank-local."""
    if not states:
        return []
    # One transfer from the GPU for all of them.
    rows = torch.stack([_largest(each) for each in states]).tolist()
    problems = []
    for state, (value, update) in zip(states, rows, strict=True):
        for what, found, limit in (("values", value, LARGEST_VALUE), ("last update", update, LARGEST_UPDATE)):
            if not found <= limit:  # NaN exceeds every limit
                unit = " × the learning rate" if what == "last update" else ""
                problems.append(f"{state.name}: {what} up to {limit:g}{unit} expected; found {found:g}")
    return problems


def _largest(state: ParameterState) -> torch.Tensor:
    """Return the largest absolute value of a parameter and of its last update, fp32 [2]; NaN if there is one."""
    value = state.value.abs().max().float()
    if not state.moments:
        return torch.stack((value, torch.zeros_like(value)))
    update = (state.moments["exp_avg"].abs() / (state.moments["exp_avg_sq"].sqrt() + 1e-8)).max().float()
    return torch.stack((value, update))

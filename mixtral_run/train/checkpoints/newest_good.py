"""The iteration that `--resume auto` continues from: the newest one whose files are what was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch.distributed as dist

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import RunConfig
from mixtral_run.errors import WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.io.files import sync_path, write_atomically
from mixtral_run.weights.manifest.adapter_files import NEXT_MARKER, file_problems
from mixtral_run.weights.manifest.checkpoint_folder import LATEST, iteration_of
from mixtral_run.weights.manifest.describe import (
    AdapterDescription,
    TrainedDescription,
    describe_adapter,
    describe_trained,
)
from mixtral_run.weights.manifest.folder_kind import ADAPTER, BASE, refuse_other_kinds

if TYPE_CHECKING:  # The command that starts a job checks folders, and needs no Megatron.
    from mixtral_run.model.parallel.mesh import Mesh

ITERATIONS = "iter_*"
SavedT = TypeVar("SavedT", AdapterDescription, TrainedDescription)
RunConfigT = TypeVar("RunConfigT", bound=RunConfig)


@dataclass(frozen=True)
class NewestGood(Generic[SavedT]):
    """What a folder of checkpoints offers to `--resume auto`.

    adapter: the newest iteration that can be used; None if there is none.
    damaged: each newer iteration with the reason why it cannot be used, the newest first.
    """

    adapter: SavedT | None
    damaged: tuple[tuple[Path, str], ...] = ()


def newest_good(save: Path, describe: Callable[[Path], SavedT]) -> NewestGood[SavedT]:
    """Read the iterations in `save`, the newest first, up to one whose files have the recorded checksums.

    describe: reads what an iteration's folder says. Raises WeightsError if `save` holds something else.
    """
    flag, kind = ("--adapter", ADAPTER) if describe is describe_adapter else ("--save", BASE)
    refuse_other_kinds(flag, save, kind)
    damaged: list[tuple[Path, str]] = []
    found = {iteration_of(each): each for each in save.glob(ITERATIONS) if each.is_dir() and iteration_of(each)}
    for iteration in sorted(found, reverse=True):
        folder = found[iteration]
        try:
            adapter = describe(folder)
            problems = file_problems(folder, adapter.files, adapter.files)
            if adapter.iteration != iteration:
                problems.append(f"its mixtral_run.json is that of iteration {adapter.iteration}")
        except WeightsError as error:
            problems = [error.problems[0] if error.problems else f"{error.what} {error.found or ''}".strip()]
        if not problems:
            return NewestGood(adapter, tuple(damaged))
        damaged.append((folder, problems[0]))
    return NewestGood(None, tuple(damaged))


def settle_resume(config: RunConfigT, mesh: Mesh, report: Report) -> RunConfigT:
    """Return the config with `--resume auto` replaced by what it is here. All ranks must call; they agree.

    The first rank gives damaged iterations another name and lets the marker name the iteration that is used. It must
    hold the lock of the output.
    """
    if config.resume != "auto":
        return config
    answer: list[Any] = [None]
    if mesh.is_first:
        answer = [_use(config.folder, config, report)]
    if mesh.world_size > 1:
        dist.broadcast_object_list(answer)
    return dataclasses.replace(config, resume="yes" if answer[0] else None)


def _use(save: Path, config: RunConfig, report: Report) -> bool:
    """Let the marker name the newest iteration that can be used. Return False if there is none."""
    if isinstance(config, PretrainConfig):
        return _mark(save, newest_good(save, describe_trained), report)
    return _mark(save, newest_good(save, describe_adapter), report)


def _mark(save: Path, found: NewestGood[Any], report: Report) -> bool:
    for folder, reason in found.damaged:
        aside = _free_name(folder)
        folder.rename(aside)
        report.warn(f"{folder} is damaged and is not used: {reason}. It is now {aside.name}")
    if found.adapter is None:
        for name in (LATEST, NEXT_MARKER):
            (save / name).unlink(missing_ok=True)
        if found.damaged:
            report.warn(f"No checkpoint in {save} can be used: the run begins at its start")
        return False
    if found.damaged or not _is_named(save, found.adapter.iteration):
        write_atomically(save / LATEST, f"{found.adapter.iteration}\n")
        (save / NEXT_MARKER).unlink(missing_ok=True)
        sync_path(save)
    return True


def _is_named(save: Path, iteration: int) -> bool:
    try:
        return (save / LATEST).read_text(encoding="utf-8", errors="replace") == f"{iteration}\n"
    except OSError:
        return False


def _free_name(folder: Path) -> Path:
    """Return a name for a damaged iteration that no reader takes for one and that does not exist."""
    number = 1
    while (aside := folder.with_name(f"damaged-{folder.name}{f'-{number}' if number > 1 else ''}")).exists():
        number += 1
    return aside

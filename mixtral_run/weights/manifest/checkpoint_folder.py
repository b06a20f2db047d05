"""A checkpoint's folder: its iterations, the marker that names the newest one, and its manifest.

Standard library only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.io.files import how_to_restore
from mixtral_run.weights.manifest.manifest import (
    MANIFEST_NAME,
    AdapterManifest,
    BaseManifest,
    IterationManifest,
    read_checkpoint_manifest,
    wrong_kind,
)

LATEST = "latest_checkpointed_iteration.txt"
CONVERTED_ITERATION = 1
"""The iteration that `convert` writes; training in the same folder continues from it."""

_ITERATION = re.compile(r"release|(?:iter_)?([0-9]{1,18})")
"""Texts of the marker; with `iter_`, names of an iteration's folder."""


class Wanted(Enum):
    """Kind of checkpoint that a command needs."""

    BASE = auto()
    ADAPTER = auto()
    ANY = auto()


_OR_ELSE = {
    Wanted.BASE: ", or an HF model's directory",
    Wanted.ADAPTER: "",
    Wanted.ANY: "; as a base to load also an HF model's directory",
}
_HOW_TO_MAKE = {
    Wanted.BASE: "mixtral-run convert --hf-model-path … --output-path … makes one",
    Wanted.ADAPTER: "mixtral-run finetune … --save … makes one",
    Wanted.ANY: "mixtral-run convert --hf-model-path … --output-path … makes a base, mixtral-run finetune … an adapter",
}


@dataclass(frozen=True)
class Checkpoint:
    """A base or adapter checkpoint: its folder, one iteration with its folder, and the manifest."""

    folder: Path
    iteration: int
    iteration_folder: Path
    manifest: BaseManifest | AdapterManifest

    @property
    def kind(self) -> str:
        """Return base or adapter."""
        return self.manifest.kind

    @property
    def architecture(self) -> MixtralArchitecture:
        """Return the sizes of the model that the checkpoint belongs to."""
        return self.manifest.architecture


def open_checkpoint(path: Path, wanted: Wanted = Wanted.ANY) -> Checkpoint:
    """Find the newest complete iteration of a checkpoint; `path` may also name the iteration's folder itself.

    wanted: what the message names if there is none.

    Raises WeightsError if the folder is not a complete checkpoint that the kit wrote.
    """
    iteration_folder = iteration_folder_of(path, wanted)
    folder = path.parent if iteration_folder == path else path
    # A converted base has one manifest next to its iterations; what training saved has one in each iteration.
    home = iteration_folder if (iteration_folder / MANIFEST_NAME).is_file() else folder
    manifest = read_checkpoint_manifest(home)
    return Checkpoint(folder, iteration_of(iteration_folder), iteration_folder, manifest)


def files_manifest_of(checkpoint: Checkpoint) -> IterationManifest:
    """Return the manifest of an iteration that training saved. Raises WeightsError for any other checkpoint."""
    if isinstance(checkpoint.manifest, IterationManifest):
        return checkpoint.manifest
    return adapter_manifest_of(checkpoint)


def adapter_manifest_of(checkpoint: Checkpoint) -> AdapterManifest:
    """Return the manifest of an adapter. Raises WeightsError if the checkpoint is not an adapter."""
    if not isinstance(checkpoint.manifest, AdapterManifest):
        label, how_to_make = AdapterManifest.LABEL, AdapterManifest.HOW_TO_MAKE
        raise wrong_kind(checkpoint.folder, checkpoint.kind, label, how_to_make)
    return checkpoint.manifest


def iteration_of(folder: Path) -> int:
    """Return the number of an `iter_…` folder; 0 for `release`."""
    found = _ITERATION.fullmatch(folder.name)
    return int(found[1]) if found and folder.name.startswith("iter_") else 0


def kept_iterations(losses: Mapping[int, float | None], keep_last: int, *, keep_best: bool) -> set[int]:
    """Return those iterations that --keep-last and --keep-best keep. losses: validation losses by iteration."""
    kept = set(sorted(losses)[-keep_last:])
    known = {iteration: loss for iteration, loss in losses.items() if loss is not None}
    if keep_best and known:
        kept.add(min(known, key=lambda iteration: (known[iteration], iteration)))
    return kept


def iteration_folder_of(path: Path, wanted: Wanted = Wanted.ANY) -> Path:
    """Return `path` if it is an iteration's folder, else the folder of the newest iteration in it.

    Raises WeightsError if there is none.
    """
    try:
        return path if (path / ".metadata").is_file() else newest_iteration(path, wanted)
    except PermissionError as error:
        raise unreadable(path, error) from error


def newest_iteration(folder: Path, wanted: Wanted = Wanted.ANY) -> Path:
    """Return the iteration's folder that LATEST names. Raises WeightsError if FOLDER is not a complete checkpoint."""
    marker = folder / LATEST
    try:
        text = marker.read_text(encoding="utf-8").strip()
    except PermissionError as error:
        raise unreadable(folder, error) from error
    except OSError as error:
        exists = folder.exists()
        raise WeightsError(
            "This is not a whole checkpoint." if exists else "There is no such folder.",
            where=str(folder),
            expected=f"a folder with {LATEST}, which is written last{_OR_ELSE[wanted]}",
            found=f"a folder without {LATEST}" if exists else None,
            next_command=how_to_restore(folder) or _HOW_TO_MAKE[wanted],
        ) from error
    except UnicodeDecodeError as error:
        raise WeightsError("The checkpoint's marker is damaged.", where=str(marker), expected="a number") from error
    # The name of a folder in this one and nothing else, so that no marker leads elsewhere.
    if _ITERATION.fullmatch(text) is None:
        raise WeightsError(
            "The checkpoint's marker is damaged.",
            where=str(marker),
            expected="the number of an iteration, or release",
            found=ascii(text) if len(text) <= 40 else f"{text[:40]!a}…",
        )
    iteration_folder = folder / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not iteration_folder.is_dir():
        raise WeightsError(
            "The checkpoint's newest iteration is missing.",
            where=str(folder),
            expected=f"the folder {iteration_folder.name}, which {LATEST} names",
            found="no such folder",
        )
    return iteration_folder


def unreadable(folder: Path, error: OSError) -> WeightsError:
    """Return the error for a checkpoint's folder that this user may not read."""
    return WeightsError(
        "The checkpoint cannot be read.",
        where=str(folder),
        expected="a folder that this user may read",
        found=error.strerror,
        next_command=f"ls -ld {shlex.quote(str(folder))}",
    )

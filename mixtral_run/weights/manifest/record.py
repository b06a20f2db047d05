"""`mixtral_run.json`: what a folder of ours is. Format in docs/formats.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run import __version__
from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.describe import DESCRIPTION, iteration_folder_of

FORMAT = 1
CONVERTED_ITERATION = 1
"""What `convert` writes; training goes on from there."""


def write_record(folder: Path, kind: str, **values: Any) -> None:
    """Write the record of a folder; the file is on the disk when this returns."""
    content = {"format": FORMAT, "kind": kind, "kit_version": __version__, **values}
    write_atomically(folder / DESCRIPTION, json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder. Raises WeightsError when there is none that can be read."""
    path = folder / DESCRIPTION
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values["format"] != FORMAT or not isinstance(values["kind"], str):
            raise ValueError(f"expected an object of format {FORMAT} with a kind")
    except FileNotFoundError:
        raise WeightsError(
            "This folder was not made by mixtral-run.", where=str(folder), expected=f"a {DESCRIPTION} file in it"
        ) from None
    except (ValueError, KeyError, OSError) as error:
        raise WeightsError("The folder's record cannot be read.", where=str(path), found=str(error)) from error
    return values


def is_kind(folder: Path, *kinds: str) -> bool:
    """Whether a folder is one of ours, of one of these kinds."""
    try:
        return read_record(folder)["kind"] in kinds
    except WeightsError:
        return False


@dataclass(frozen=True)
class Checkpoint:
    """A base or adapter checkpoint: its folder, the iteration's folder and the record."""

    folder: Path
    iteration: int
    iteration_folder: Path
    record: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.record["kind"])

    @property
    def architecture(self) -> MixtralArchitecture:
        return MixtralArchitecture.from_mapping(self.record["architecture"])


def open_checkpoint(path: Path) -> Checkpoint:
    """Find the newest whole iteration of a checkpoint; `path` may also name the iteration's folder itself.

    Raises WeightsError when the folder is not a checkpoint of ours, or not a whole one.
    """
    iteration_folder = iteration_folder_of(path)
    folder = path.parent if iteration_folder == path else path
    # A base's record lies beside the iteration, an adapter's within it: an adapter has a record for every iteration.
    home = iteration_folder if (iteration_folder / DESCRIPTION).is_file() else folder
    record = read_record(home)
    try:
        MixtralArchitecture.from_mapping(record["architecture"])
    except (KeyError, TypeError) as error:
        raise WeightsError("The folder's record names no architecture.", where=str(home), found=str(error)) from error
    return Checkpoint(folder, iteration_of(iteration_folder), iteration_folder, record)


def iteration_of(folder: Path) -> int:
    """The number of an `iter_…` folder; 0 for `release`."""
    return int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else 0

"""What a checkpoint folder, or an HF directory, says of itself. Standard library only: asked before anything heavy is
imported.

The files are described in docs/formats.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.hf.safetensors_files import HFWeights, is_hf_directory, open_hf_weights
from mixtral_run.weights.io.files import how_to_restore

LATEST = "latest_checkpointed_iteration.txt"
DESCRIPTION = "mixtral_run.json"
UNKNOWN_FINGERPRINT = ""
"""Of a base whose weights are still on the hub."""


_KINDS = {
    "base": "kind 'base', as `mixtral-run convert` writes",
    "adapter": "kind 'adapter', as `mixtral-run finetune` writes",
}


@dataclass(frozen=True)
class BaseDescription:
    """What a base checkpoint says of itself, or what the headers of an HF directory do.

    fingerprint: for an HF directory only its first half, which needs the norms and routers alone; the whole is known
    once every byte was read (`MixtralModel.base_fingerprint`). weights: where the HF directory's tensors lie.
    """

    folder: Path
    architecture: MixtralArchitecture
    dtype: str
    fingerprint: str
    weights: HFWeights | None = None

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.folder / "tokenizer" if self.weights is None else self.folder


@dataclass(frozen=True)
class AdapterDescription:
    """What an adapter checkpoint says of itself; `folder` is that of its newest iteration."""

    folder: Path
    iteration: int
    lora: Mapping[str, Any]
    base_fingerprint: str
    training: Mapping[str, Any]
    """The settings of the run that saved it, by their names in its config."""
    data_sha256: str | None


def describe_base(load: Path) -> BaseDescription:
    """Read LOAD/mixtral_run.json, or the headers of the HF model that LOAD is.

    Raises WeightsError when LOAD is no whole base checkpoint, or with everything that is wrong with the HF model.
    """
    try:
        is_hf_model = is_hf_directory(load) and not (load / LATEST).exists()
    except OSError as error:
        raise _unreadable(load, error) from error
    if is_hf_model:
        return _describe_hf(load)
    newest_iteration(load)
    values = _read_description(load / DESCRIPTION, "base")
    try:
        architecture = MixtralArchitecture.from_mapping(values["architecture"])
        return BaseDescription(load, architecture, values["dtype"], values["fingerprint"])
    except (KeyError, TypeError) as error:
        raise WeightsError(
            "The checkpoint's description is incomplete.", where=str(load / DESCRIPTION), found=repr(error)
        ) from error


def _describe_hf(directory: Path) -> BaseDescription:
    from mixtral_run.weights.hf.fingerprint import quick_fingerprint

    weights = open_hf_weights(directory)
    return BaseDescription(directory, weights.architecture, weights.dtype, quick_fingerprint(weights), weights)


def describe_adapter(folder: Path) -> AdapterDescription:
    """Read the newest iteration's description, or that of the iteration whose folder it is. Raises WeightsError when
    FOLDER holds no whole adapter."""
    iteration_folder = iteration_folder_of(folder)
    values = _read_description(iteration_folder / DESCRIPTION, "adapter")
    try:
        return AdapterDescription(
            iteration_folder,
            values["iteration"],
            values["lora"],
            values["base"]["fingerprint"],
            values.get("training", {}),
            values.get("data_sha256"),
        )
    except (KeyError, TypeError) as error:
        raise WeightsError(
            "The adapter's description is incomplete.", where=str(iteration_folder / DESCRIPTION), found=repr(error)
        ) from error


def check_adapter_fits(adapter: AdapterDescription, base: BaseDescription) -> None:
    """Raise WeightsError when the adapter was trained on another base, as far as the base's fingerprint is known."""
    known = adapter.base_fingerprint if "-" in base.fingerprint else adapter.base_fingerprint.split("-")[0]
    if base.fingerprint not in (known, UNKNOWN_FINGERPRINT):
        raise WeightsError(
            "The adapter was trained on another base.",
            where=str(adapter.folder),
            expected=f"the base with fingerprint {adapter.base_fingerprint}",
            found=f"{base.folder}, fingerprint {base.fingerprint}",
            next_command="give --load the checkpoint that the adapter was trained on",
        )


def iteration_folder_of(path: Path) -> Path:
    """The path itself where it is the folder of an iteration, else that of the newest one. Raises WeightsError where
    there is none."""
    try:
        return path if (path / ".metadata").is_file() else newest_iteration(path)
    except PermissionError as error:
        raise _unreadable(path, error) from error


def newest_iteration(folder: Path) -> Path:
    """The folder that LATEST names. Raises WeightsError when FOLDER is no whole checkpoint."""
    marker = folder / LATEST
    try:
        text = marker.read_text(encoding="utf-8").strip()
    except PermissionError as error:
        raise _unreadable(folder, error) from error
    except OSError as error:
        raise WeightsError(
            "This is not a whole checkpoint.",
            where=str(folder),
            expected=f"a folder with {LATEST}, which is written last; as a base to load also an HF model's directory",
            found="no such folder" if not folder.exists() else f"a folder without {LATEST}",
            next_command=how_to_restore(folder)
            or "mixtral-run convert --hf-model-path … --output-path … makes a base, mixtral-run finetune … an adapter",
        ) from error
    except UnicodeDecodeError as error:
        raise WeightsError("The checkpoint's marker is damaged.", where=str(marker), expected="a number") from error
    iteration_folder = folder / (
        "release" if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else text
    )
    if not iteration_folder.is_dir():
        raise WeightsError(
            "The checkpoint's newest iteration is missing.",
            where=str(folder),
            expected=f"the folder {iteration_folder.name}, which {LATEST} names",
            found="no such folder",
        )
    return iteration_folder


def _unreadable(folder: Path, error: OSError) -> WeightsError:
    return WeightsError(
        "The checkpoint cannot be read.",
        where=str(folder),
        expected="a folder that this user may read",
        found=error.strerror,
        next_command=f"ls -ld {folder}",
    )


def _read_description(path: Path, kind: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"The checkpoint does not say what it is: {DESCRIPTION} cannot be read.",
            where=str(path),
            expected=_KINDS[kind],
            found=getattr(error, "strerror", None) or str(error),
            next_command=f"mixtral-run verify --load {path.parent}",
        ) from error
    found = values.get("kind") if isinstance(values, dict) else None
    if found != kind:
        raise WeightsError(
            "The checkpoint is of another kind.",
            where=str(path),
            expected=_KINDS[kind],
            found=f"kind {found!r}",
            next_command=f"mixtral-run verify --load {path.parent}",
        )
    assert isinstance(values, dict)
    return values

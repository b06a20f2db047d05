"""Describe the base or the adapter that a verb was given, before anything heavy is imported. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_run.config.former_settings import FormerSettings
from mixtral_run.errors import WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.hf.hf_weights import HFWeights, is_hf_directory, open_hf_weights
from mixtral_run.weights.manifest.checkpoint_folder import (
    LATEST,
    Wanted,
    adapter_manifest_of,
    newest_iteration,
    open_checkpoint,
    unreadable,
)
from mixtral_run.weights.manifest.folder_kind import ADAPTER, BASE, HF_MODEL, refuse_other_kinds
from mixtral_run.weights.manifest.manifest import (
    MANIFEST_NAME,
    UNKNOWN_FINGERPRINT,
    BaseManifest,
    TrainedManifest,
    read_manifest,
    wrong_kind,
)
from mixtral_run.weights.manifest.run_state import RunState
from mixtral_run.weights.manifest.template_record import TemplateRecord


@dataclass(frozen=True)
class BaseDescription:
    """A base to load: from the manifest of a base checkpoint, or from the headers of an HF directory.

    fingerprint: for an HF directory only its first half, which needs no more than the norms and routers; the whole is
    known once every byte was read (`MixtralModel.base_fingerprint`). weights: the tensors of an HF directory, None for
    a checkpoint. converted_from: the HF model that a checkpoint was converted from, None for an HF directory.
    """

    folder: Path
    architecture: MixtralArchitecture
    dtype: str
    fingerprint: str
    weights: HFWeights | None = None
    converted_from: str | None = None

    @property
    def hf_model(self) -> str | None:
        """Return the name or directory of the HF model; None if the checkpoint does not record it."""
        return self.converted_from if self.weights is None else str(self.folder.resolve())

    @property
    def notes(self) -> tuple[str, ...]:
        """Return lines for the user about what of an HF model is not used, or used in another form."""
        return () if self.weights is None else self.weights.notes

    @property
    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer's files."""
        return self.folder / "tokenizer" if self.weights is None else self.folder


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter to load, from its manifest; `folder` is the iteration's."""

    folder: Path
    iteration: int
    lora: LoraSettings
    base_fingerprint: str
    training: Mapping[str, Any]
    """Settings of the run that saved the adapter, by their names in its config."""
    data_sha256: str | None
    validation: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The newest and the lowest validation loss; empty if the run had no validation set."""
    chat_template: TemplateRecord | None = field(default=None, kw_only=True)
    """The template that the adapter was trained with; None for adapters of earlier versions."""
    files: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    """CRC-32 of the iteration's files by name; empty if an earlier version of the kit wrote the adapter."""
    state: RunState = field(default_factory=RunState, kw_only=True)
    former: tuple[FormerSettings, ...] = field(default=(), kw_only=True)
    """Settings of the run that --resume changed."""


@dataclass(frozen=True, kw_only=True)
class TrainedDescription:
    """A checkpoint of full fine-tuning that --resume continues from; `folder` is the iteration's.

    start_fingerprint: of the base that the run began with. For the other fields see AdapterDescription.
    """

    folder: Path
    iteration: int
    start_fingerprint: str
    training: Mapping[str, Any]
    data_sha256: str | None
    validation: Mapping[str, Any]
    chat_template: TemplateRecord | None
    files: Mapping[str, int]
    state: RunState
    former: tuple[FormerSettings, ...] = ()


def describe_base(load: Path) -> BaseDescription:
    """Read the manifest of the base checkpoint LOAD, or the headers of the HF model LOAD.

    Raises WeightsError if LOAD is not a complete base checkpoint, or with all problems of the HF model.
    """
    refuse_other_kinds("--load", load, BASE, HF_MODEL)
    try:
        is_hf_model = is_hf_directory(load) and not (load / LATEST).exists()
    except OSError as error:
        raise unreadable(load, error) from error
    if is_hf_model:
        return _describe_hf(load)
    newest = newest_iteration(load, Wanted.BASE)
    manifest = read_manifest(newest if (newest / MANIFEST_NAME).is_file() else load, BaseManifest)
    return BaseDescription(load, manifest.architecture, manifest.dtype, manifest.fingerprint, None, manifest.source)


def _describe_hf(directory: Path) -> BaseDescription:
    from mixtral_run.weights.hf.fingerprint import quick_fingerprint

    weights = open_hf_weights(directory)
    return BaseDescription(directory, weights.architecture, weights.dtype, quick_fingerprint(weights), weights)


def describe_adapter(folder: Path) -> AdapterDescription:
    """Read the manifest of an adapter's newest iteration, or of the iteration that FOLDER is.

    Raises WeightsError if FOLDER is not a complete adapter checkpoint.
    """
    refuse_other_kinds("--adapter", folder, ADAPTER)
    checkpoint = open_checkpoint(folder, Wanted.ADAPTER)
    manifest = adapter_manifest_of(checkpoint)
    return AdapterDescription(
        checkpoint.iteration_folder,
        manifest.iteration,
        manifest.lora,
        manifest.base.fingerprint,
        manifest.training,
        manifest.data_sha256,
        files=manifest.files,
        state=manifest.state,
        validation=manifest.validation,
        chat_template=manifest.chat_template,
        former=manifest.former,
    )


def describe_trained(folder: Path) -> TrainedDescription:
    """Read the manifest of the newest iteration of full fine-tuning, or of the iteration that FOLDER is.

    Raises WeightsError if FOLDER is not a complete checkpoint of full fine-tuning.
    """
    refuse_other_kinds("--save", folder, BASE)
    checkpoint = open_checkpoint(folder)
    manifest = checkpoint.manifest
    if not isinstance(manifest, TrainedManifest):
        raise wrong_kind(checkpoint.folder, checkpoint.kind, TrainedManifest.LABEL, TrainedManifest.HOW_TO_MAKE)
    return TrainedDescription(
        folder=checkpoint.iteration_folder,
        iteration=manifest.iteration,
        start_fingerprint=manifest.base.fingerprint,
        training=manifest.training,
        data_sha256=manifest.data_sha256,
        validation=manifest.validation,
        chat_template=manifest.chat_template,
        files=manifest.files,
        state=manifest.state,
        former=manifest.former,
    )


def check_same_start(trained: TrainedDescription, base: BaseDescription) -> None:
    """Raise WeightsError if the run began with another base than --load, as far as both fingerprints are known."""
    if not _is_base(trained.start_fingerprint, base):
        raise WeightsError(
            "The run began with another base.",
            where=str(trained.folder),
            expected=f"--load with the base of fingerprint {trained.start_fingerprint}",
            found=f"{base.folder}, fingerprint {base.fingerprint}",
            next_command="the same command with the --load that the run was started with; or without --resume, with "
            "another --save",
        )


def _is_base(fingerprint: str, base: BaseDescription) -> bool:
    """Return True unless the fingerprints are known to differ; that of an HF directory may be only its first half."""
    known = fingerprint if "-" in base.fingerprint else fingerprint.split("-")[0]
    return fingerprint == UNKNOWN_FINGERPRINT or base.fingerprint in (known, UNKNOWN_FINGERPRINT)


def check_adapter_fits(adapter: AdapterDescription, base: BaseDescription) -> None:
    """Raise WeightsError if the adapter was trained on another base, as far as both fingerprints are known."""
    if not _is_base(adapter.base_fingerprint, base):
        raise WeightsError(
            "The adapter was trained on another base.",
            where=str(adapter.folder),
            expected=f"the base with fingerprint {adapter.base_fingerprint}",
            found=f"{base.folder}, fingerprint {base.fingerprint}",
            next_command="give --load the checkpoint that the adapter was trained on",
        )

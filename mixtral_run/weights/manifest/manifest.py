"""The only reader and writer of mixtral_run.json, the manifest of every folder that the kit writes.

Standard library only. docs/formats.md describes the file. The readers accept one format and check kind and fields, so
that a folder is either understood by every verb or refused by every verb with the same error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mixtral_run import __version__
from mixtral_run.config.former_settings import FORMER_SETTINGS, FormerSettings, from_values
from mixtral_run.errors import WeightsError, shortened
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.fields import BaseReference, Fields, shown, unprintable
from mixtral_run.weights.manifest.run_state import RunState
from mixtral_run.weights.manifest.self_checksum import FIELD as CHECKSUM
from mixtral_run.weights.manifest.self_checksum import checksum_problems, with_checksum
from mixtral_run.weights.manifest.template_record import TemplateRecord

MANIFEST_NAME = "mixtral_run.json"
FORMAT = 1
"""The format that this version writes, and the only one that it reads."""

UNKNOWN_FINGERPRINT = ""
"""Fingerprint of a base whose weights are still on the hub, or that another program saved."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The part that all kinds share. values: the whole JSON object, as `verify --json` prints it."""

    KINDS: ClassVar[tuple[str, ...]]
    LABEL: ClassVar[str]
    HOW_TO_MAKE: ClassVar[str]

    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Return the kind under which the folder is recorded."""
        return str(self.values["kind"])


@dataclass(frozen=True, kw_only=True)
class BaseManifest(Manifest):
    """Manifest of a base checkpoint. dtype: of the weights on disk. source: the HF model that was converted."""

    KINDS = ("base",)
    LABEL = "a base checkpoint"
    HOW_TO_MAKE = "mixtral-run convert --hf-model-path … --output-path …, which writes one"

    architecture: MixtralArchitecture
    dtype: str
    fingerprint: str
    source: str | None = None

    @classmethod
    def parse(cls, fields: Fields) -> BaseManifest:
        """Return the manifest; problems are collected in `fields`."""
        return cls(
            values=fields.values,
            architecture=fields.architecture(),
            dtype=fields.text("dtype"),
            fingerprint=fields.text("fingerprint"),
            source=fields.optional_text("source"),
        )


@dataclass(frozen=True, kw_only=True)
class IterationManifest(Manifest):
    """What every iteration of a training run records, whether it is an adapter or a whole model.

    base: that the adapter belongs to, or that full fine-tuning began with.
    training: the settings of the run that saved it, by their names in its config. data_sha256: of --data-path.
    files, tokenizer_files: CRC-32 by name of the other files of the iteration, and of those of the tokenizer; empty if
    an earlier version of the kit wrote the adapter.
    validation: the newest and the lowest validation loss, as train/early_stopping.py keeps them; empty without any.
    chat_template: the template that it was trained with; None for adapters of earlier versions.
    """

    architecture: MixtralArchitecture
    iteration: int
    base: BaseReference
    training: Mapping[str, Any]
    data_sha256: str | None
    files: Mapping[str, int]
    tokenizer_files: Mapping[str, int]
    state: RunState
    validation: Mapping[str, Any]
    chat_template: TemplateRecord | None
    former: tuple[FormerSettings, ...] = ()

    @staticmethod
    def iteration_values(fields: Fields, *, has_checksums: bool) -> dict[str, Any]:
        """Return the values of these fields; problems are collected in `fields`. has_checksums: `files` is required."""
        return {
            "values": fields.values,
            "architecture": fields.architecture(),
            "iteration": fields.whole_number("iteration", at_least=0),
            "base": fields.base(),
            "training": fields.mapping("training", default={}).values,
            "data_sha256": fields.optional_text("data_sha256"),
            "files": fields.mapping("files", default=None if has_checksums else {}).checksums(),
            "tokenizer_files": fields.mapping("tokenizer_files", default={}).checksums(),
            "state": RunState.from_mapping(fields.mapping("state", default={}).values, fields.problems),
            "validation": fields.mapping("validation", default={}).values,
            "chat_template": fields.chat_template(),
            "former": from_values(fields.values.get(FORMER_SETTINGS), fields.problems),
        }


@dataclass(frozen=True, kw_only=True)
class TrainedManifest(IterationManifest, BaseManifest):
    """Manifest of one iteration of full fine-tuning: a base, and what --resume continues with."""

    LABEL = "a checkpoint of full fine-tuning"
    HOW_TO_MAKE = "mixtral-run pretrain … --save FOLDER, which writes one"

    @classmethod
    def parse(cls, fields: Fields) -> TrainedManifest:
        """Return the manifest; problems are collected in `fields`."""
        return cls(
            dtype=fields.text("dtype"),
            fingerprint=fields.text("fingerprint"),
            source=fields.optional_text("source"),
            **cls.iteration_values(fields, has_checksums=True),
        )


@dataclass(frozen=True, kw_only=True)
class AdapterManifest(IterationManifest):
    """Manifest of one iteration of an adapter checkpoint."""

    KINDS = ("adapter",)
    LABEL = "an adapter"
    HOW_TO_MAKE = "mixtral-run finetune … --save FOLDER, which writes one"

    lora: LoraSettings

    @classmethod
    def parse(cls, fields: Fields) -> AdapterManifest:
        """Return the manifest; problems are collected in `fields`."""
        return cls(**cls.iteration_values(fields, has_checksums=False), lora=fields.lora())


@dataclass(frozen=True, kw_only=True)
class QuantizedCacheManifest(Manifest):
    """Manifest of the quantized experts next to a base; quantized_cache/layout.py compares the other values.

    checksums: CRC-32 of the cache's tensors. source_checksums: CRC-32 of the experts' HF tensors if the base is an HF
    model, else empty.
    """

    KINDS = ("quantised",)
    LABEL = "a cache of quantized experts"
    HOW_TO_MAKE = "mixtral-run finetune … --base-precision fp8, which writes one"

    base: BaseReference
    checksums: Mapping[str, int]
    source_checksums: Mapping[str, int]

    @classmethod
    def parse(cls, fields: Fields) -> QuantizedCacheManifest:
        """Return the manifest; problems are collected in `fields`."""
        return cls(
            values=fields.values,
            base=fields.base(),
            checksums=fields.mapping("tensors").checksums(),
            source_checksums=fields.mapping("base").mapping("tensors", default={}).checksums(),
        )


@dataclass(frozen=True, kw_only=True)
class ExportManifest(Manifest):
    """Manifest of a PEFT directory (kind peft) or of an HF model that the kit wrote (kind hf).

    layout: of a PEFT directory: peft, peft-fused or vllm. adapter: the checkpoint that was exported or merged.
    chat_template: of a PEFT directory: the template that the adapter was trained with, if it is known.
    """

    KINDS = ("peft", "hf")
    LABEL = "an export"
    HOW_TO_MAKE = "mixtral-run export --adapter … --output-path …, which writes one"

    layout: str | None
    adapter: str | None
    chat_template: TemplateRecord | None

    @classmethod
    def parse(cls, fields: Fields) -> ExportManifest:
        """Return the manifest; problems are collected in `fields`."""
        return cls(
            values=fields.values,
            layout=fields.optional_text("layout"),
            adapter=fields.optional_text("adapter"),
            chat_template=fields.chat_template(),
        )


_CLASSES = (BaseManifest, AdapterManifest, QuantizedCacheManifest, ExportManifest)
M = TypeVar("M", BaseManifest, TrainedManifest, AdapterManifest, QuantizedCacheManifest, ExportManifest)


def write_manifest(folder: Path, kind: str, **values: Any) -> None:
    """Write the manifest of a folder; the file is on the disk when this returns. An iteration's has a checksum."""
    content = {"format": FORMAT, "kind": kind, "kit_version": __version__, **values}
    text = (
        with_checksum(content)
        if kind in AdapterManifest.KINDS or "files" in values
        else json.dumps(content, indent=2) + "\n"
    )
    write_atomically(folder / MANIFEST_NAME, text)


def read_manifest(folder: Path, expected: type[M]) -> M:
    """Read a folder's manifest of one kind. Raises WeightsError if it is missing, damaged or of another kind."""
    values = read_values(folder, expected.HOW_TO_MAKE)
    if values["kind"] not in expected.KINDS or (issubclass(expected, TrainedManifest) and not is_trained(values)):
        raise wrong_kind(folder, values["kind"], expected.LABEL, expected.HOW_TO_MAKE)
    return _parse(folder, values, expected.parse)


def read_checkpoint_manifest(folder: Path) -> BaseManifest | AdapterManifest:
    """Read the manifest of a base or of an adapter's iteration. Raises WeightsError as `read_manifest` does."""
    how_to_make = "mixtral-run convert …, which writes a base, or mixtral-run finetune …, which writes an adapter"
    values = read_values(folder, how_to_make)
    if values["kind"] in BaseManifest.KINDS:
        return _parse(folder, values, TrainedManifest.parse if is_trained(values) else BaseManifest.parse)
    if values["kind"] in AdapterManifest.KINDS:
        return _parse(folder, values, AdapterManifest.parse)
    raise wrong_kind(folder, values["kind"], "a checkpoint", how_to_make)


def read_iteration_manifest(folder: Path) -> AdapterManifest | TrainedManifest:
    """Read the manifest of an iteration that training saved: of an adapter, or of all weights.

    Raises WeightsError as `read_manifest` does, also for a base that was converted.
    """
    manifest = read_checkpoint_manifest(folder)
    if not isinstance(manifest, AdapterManifest | TrainedManifest):
        raise wrong_kind(folder, manifest.kind, "a checkpoint of a training run", AdapterManifest.HOW_TO_MAKE)
    return manifest


def is_trained(values: Mapping[str, Any]) -> bool:
    """Return True for the values of a base that full fine-tuning saved: one manifest in each of its iterations."""
    return values.get("kind") in BaseManifest.KINDS and "files" in values


def is_kind(folder: Path, *kinds: str) -> bool:
    """Return True if the kit wrote the folder, in the format of this version, as one of these kinds.

    Other fields are not looked at: an export that was damaged since may still be overwritten.
    """
    try:
        return read_values(folder)["kind"] in kinds
    except WeightsError:
        return False


def read_values(folder: Path, how_to_make: str | None = None) -> dict[str, Any]:
    """Read the JSON object and check its format and that it has a kind; other fields are as they are.

    how_to_make: the command to name if the folder has no manifest. Raises WeightsError.
    """
    path = folder / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(
            f"The folder does not say what it is: it has no {MANIFEST_NAME}.",
            where=str(folder),
            expected=f"{MANIFEST_NAME}, which mixtral-run writes last",
            next_command=how_to_make,
        ) from error
    except OSError as error:
        raise WeightsError(
            f"{MANIFEST_NAME} cannot be read.", where=str(path), found=error.strerror, next_command=f"ls -l {path}"
        ) from error
    # RecursionError: the JSON is nested thousands deep.
    except (ValueError, RecursionError) as error:
        raise _damaged(path, [f"not valid JSON: {error}"]) from error
    if not isinstance(values, dict):
        raise _damaged(path, [f"expected a JSON object; found {shown(values)}"])
    if (place := unprintable(values)) is not None:
        raise _damaged(path, [f"{place}: holds a control character"])
    found = values.get("format")
    if type(found) is not int:
        raise _damaged(path, [f"format: expected {FORMAT}; found {shown(found)}"])
    if found != FORMAT:
        version = values.get("kit_version")
        version = version if isinstance(version, str) and len(version) <= 40 else "of unknown version"
        raise WeightsError(
            f"{MANIFEST_NAME} has a format that this version of mixtral-run does not understand.",
            where=str(path),
            expected=f"format {FORMAT}, which mixtral-run {__version__} reads",
            found=f"format {shown(found)}, written by mixtral-run {version}",
            next_command="pip install --upgrade mixtral-run" if found > FORMAT else how_to_make,
        )
    if not isinstance(values.get("kind"), str):
        raise _damaged(path, [f"kind: expected a text; found {shown(values.get('kind'))}"])
    return values


def _parse(folder: Path, values: dict[str, Any], parse: Callable[[Fields], M]) -> M:
    fields = Fields(values, [])
    manifest = parse(fields)
    if not fields.problems and {CHECKSUM, "files"} & values.keys():
        fields.problems += checksum_problems((folder / MANIFEST_NAME).read_bytes())
    if fields.problems:
        raise _damaged(folder / MANIFEST_NAME, fields.problems)
    return manifest


def _damaged(path: Path, problems: list[str]) -> WeightsError:
    return WeightsError(
        f"{MANIFEST_NAME} is damaged, or was not written by mixtral-run.",
        where=str(path),
        problems=shortened(problems),
        next_command="copy the folder again from where it was made, or run the command again that wrote it",
    )


def wrong_kind(folder: Path, kind: str, label: str, how_to_make: str) -> WeightsError:
    """Return the error for a folder of this kind where another one is needed."""
    known = {kind: each.LABEL for each in _CLASSES for kind in each.KINDS}
    return WeightsError(
        f"This is not {label}.",
        where=str(folder / MANIFEST_NAME),
        expected=label,
        found=f"{known[kind]}, kind {kind!r}" if kind in known else f"unknown kind {shown(kind)}",
        next_command=how_to_make,
    )

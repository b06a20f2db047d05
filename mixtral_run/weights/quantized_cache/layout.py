"""Experts in 8 or 4 bit, kept beside the base that they were made of: BASE/quantised-fp8, BASE/quantised-nf4.

A file a layer, an expert's matrices each a tensor: whatever the layout, a rank reads its own experts and nothing else.
Format in docs/formats.md. Here is what such a folder holds and whether it is the base's; writer.py writes it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from mixtral_run.config.verbs import BASE_PRECISIONS
from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.hf.fingerprint import source_checksums
from mixtral_run.weights.hf.safetensors_files import ITEM_SIZES, Source, TensorEntry, mixed_header
from mixtral_run.weights.io.crc import crc_of
from mixtral_run.weights.manifest.checkpoint_folder import newest_iteration
from mixtral_run.weights.manifest.describe import BaseDescription
from mixtral_run.weights.manifest.manifest import (
    MANIFEST_NAME,
    QuantizedCacheManifest,
    is_kind,
    read_manifest,
    read_values,
)
from mixtral_run.weights.torch_dist.metadata import METADATA_NAME

KIND = "quantised"
LAYOUT = 1
"""Version of the files' layout: names, order and shapes of the tensors."""
LINEARS = ("linear_fc1", "linear_fc2")
PARTS = ("scales", "values")
"""In the order of a file: numbers of more bytes first, so that all of them lie aligned."""


def kept_folder(base: Path, precision: str) -> Path:
    """Where the experts of the base in that folder are kept."""
    return base / f"quantised-{precision}"


def tensor_name(layer: int, expert: int, linear: str, part: str) -> str:
    return f"layers.{layer}.experts.{expert}.{linear}.{part}"


@dataclass(frozen=True)
class Files:
    """The files of a folder, as they follow from the model and the precision alone."""

    folder: Path
    architecture: MixtralArchitecture
    precision: str

    def file(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:02d}.safetensors"

    def header(self, layer: int) -> bytes:
        return mixed_header(self._tensors(layer))

    def entries(self, layer: int) -> dict[str, TensorEntry]:
        """The tensors of a layer's file by name. Raises ValueError where rows cannot be cut into blocks of 4 bit."""
        start = len(self.header(layer))
        found = {}
        for name, (word, shape) in self._tensors(layer).items():
            num_bytes = prod(shape) * ITEM_SIZES[word]
            found[name] = TensorEntry(name, word, shape, self.file(layer), start, num_bytes)
            start += num_bytes
        return found

    @cached_property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self.file_bytes(layer) for layer in range(self.architecture.num_layers))

    def file_bytes(self, layer: int) -> int:
        return len(self.header(layer)) + sum(entry.num_bytes for entry in self.entries(layer).values())

    def _tensors(self, layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            tensor_name(layer, expert, linear, part): self._stored[linear, part]
            for part in PARTS
            for expert in range(self.architecture.num_experts)
            for linear in LINEARS
        }

    @cached_property
    def _stored(self) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
        import torch

        from mixtral_run.model.kernels.quantized.quantized_mm import quantized_layout

        words = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
        hidden, ffn = self.architecture.hidden_size, self.architecture.ffn_hidden_size
        stored = {}
        for linear, size in (("linear_fc1", (2 * ffn, hidden)), ("linear_fc2", (hidden, ffn))):
            values, scales = quantized_layout(*size, self.precision)
            for part, (dtype, shape) in (("values", values), ("scales", scales)):
                stored[linear, part] = (words[dtype], shape)
        return stored


@dataclass(frozen=True)
class Kept:
    """A whole folder whose experts are those of the base that was asked for.

    fingerprint: the base's, whole. sources: CRC-32 of the experts' HF tensors, where the base is an HF model.
    checksums: of the folder's own tensors. digest: the same on all ranks that see the same content. written: inode and
    time of the record, others once a folder was made again.
    """

    files: Files
    fingerprint: str
    sources: Mapping[str, int]
    checksums: Mapping[str, int]
    digest: int
    written: tuple[int, int]


@dataclass(frozen=True)
class Look:
    """What was found where experts would be kept: them, or why not; the reason is empty where there is nothing."""

    kept: Kept | None
    why: str = ""


def identity(base: BaseDescription) -> dict[str, Any]:
    """What tells, without reading its experts, that a base is still the one that others were made of.

    Of a checkpoint its fingerprint, its iteration and the CRC-32 of that iteration's map of tensors: Megatron-LM, which
    trains on from it in the same folder, leaves the fingerprint as it is. An HF model has no record: size and time of
    change of its files; the weights that every start reads are compared once they are read.
    """
    if base.weights is None:
        folder = newest_iteration(base.folder)
        metadata = f"{crc_of(folder / METADATA_NAME):08x}"
        return {"fingerprint": base.fingerprint, "iteration": folder.name, "metadata_crc32": metadata}
    stats = {file.name: file.stat() for file in base.weights.files}
    return {"files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def rounded_to(stored: str, model: str) -> str:
    """The dtype that experts have when they are quantized: the stored one, unless the model's holds less of it."""
    return stored if model in (stored, "float32") else model


def look(base: BaseDescription, precision: str, dtype: str) -> Look:
    """What is kept of this base's experts. dtype: see `rounded_to`. Reads the record and the files' headers."""
    folder = kept_folder(base.folder, precision)
    if not folder.exists():
        return Look(None)
    try:
        manifest = read_manifest(folder, QuantizedCacheManifest)
        files = Files(folder, base.architecture, precision)
        why = _of_another(manifest, base, files, dtype) or next(iter(file_problems(files)), None)
        if why is None:
            return Look(_kept(manifest, files))
    except WeightsError as error:
        why = error.found or "; ".join(error.problems) or error.what
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
    return Look(None, why)


def _of_another(manifest: QuantizedCacheManifest, base: BaseDescription, files: Files, dtype: str) -> str | None:
    """How the record differs from what is wanted."""
    from mixtral_run.model.kernels.quantized.quantized_mm import KEPT_AS

    wanted = {
        "layout": LAYOUT,
        "precision": files.precision,
        "method": KEPT_AS[files.precision],
        "architecture": json.loads(json.dumps(files.architecture.to_mapping())),
        "dtype": dtype,
    }
    for name, value in wanted.items():
        if manifest.values.get(name) != value:
            return f"made as {name} {manifest.values.get(name)}, not {value}"
    if not manifest.base.fingerprint.startswith(base.fingerprint):
        return f"made of a base with fingerprint {manifest.base.fingerprint}, not {base.fingerprint}"
    for name, value in identity(base).items():
        if manifest.values["base"].get(name) != value:
            return f"the base's {name.replace('_crc32', '')} changed since"
    return None


def file_problems(files: Files) -> list[str]:
    """A line for each file that cannot be the folder's, by size and header."""
    problems = []
    for layer in range(files.architecture.num_layers):
        file, header = files.file(layer), files.header(layer)
        try:
            size, expected = file.stat().st_size, files.file_bytes(layer)
            with file.open("rb") as stream:
                begins = stream.read(len(header))
        except OSError as error:
            problems.append(f"{file.name}: {error.strerror}")
            continue
        if size != expected:
            problems.append(f"{file.name}: expected {expected:,} bytes; found {size:,}")
        elif begins != header:
            problems.append(f"{file.name}: its header is another")
    return problems


def _kept(manifest: QuantizedCacheManifest, files: Files) -> Kept:
    checksums = manifest.checksums
    for layer in range(files.architecture.num_layers):
        missing = files.entries(layer).keys() - checksums.keys()
        if missing:
            raise ValueError(f"no checksum of {min(missing)}")
    digest = zlib.crc32(json.dumps(manifest.values, sort_keys=True).encode())
    stat = (files.folder / MANIFEST_NAME).stat()
    written = (stat.st_ino, stat.st_mtime_ns)
    return Kept(files, manifest.base.fingerprint, manifest.source_checksums, checksums, digest, written)


def beside(base: BaseDescription) -> dict[str, Look]:
    """What is kept beside a base, by precision; of which dtype does not matter."""
    found = {}
    for precision in BASE_PRECISIONS:
        folder = kept_folder(base.folder, precision)
        if is_kind(folder, KIND):
            found[precision] = look(base, precision, str(read_values(folder).get("dtype")))
    return found


def check(kept: Kept, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Read every byte once; a line for each tensor that is not what was written."""
    problems = []
    for layer in range(kept.files.architecture.num_layers):
        sources = {name: source_of(entry) for name, entry in kept.files.entries(layer).items()}
        problems += differing(kept, sources, source_checksums(sources, advance=advance))
    return problems


def differing(kept: Kept, sources: Mapping[str, Source], found: Mapping[str, int]) -> list[str]:
    """A line for each tensor whose bytes, by their CRC-32, are others than those that were written."""
    return [
        f"{sources[name].file.name}: {name}: expected CRC-32 {kept.checksums[name]:08x}; found {crc:08x}"
        for name, crc in found.items()
        if crc != kept.checksums[name]
    ]


def source_of(entry: TensorEntry) -> Source:
    return Source(entry.file, entry.start, entry.num_bytes)

"""Layout of the cache of quantized experts next to their base (BASE/quantised-fp8, BASE/quantised-nf4), and its checks.

The cache has one file for each layer, and one tensor for each matrix of each expert: in any TP/EP layout a rank reads
its own experts and nothing else. docs/formats.md describes the format; writer.py writes it.
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

from mixtral_run.config.precision import BASE_PRECISIONS
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
"""The order within a file: elements of more bytes come first, so that all tensors are aligned."""


def cache_folder(base: Path, precision: str) -> Path:
    """Return the folder of the cache that belongs to a base."""
    return base / f"quantised-{precision}"


def tensor_name(layer: int, expert: int, linear: str, part: str) -> str:
    """Return the key of a tensor in its layer's file."""
    return f"layers.{layer}.experts.{expert}.{linear}.{part}"


@dataclass(frozen=True)
class Files:
    """The files of a cache. Architecture and precision determine names, sizes and headers."""

    folder: Path
    architecture: MixtralArchitecture
    precision: str

    def file(self, layer: int) -> Path:
        """Return the path of a layer's file."""
        return self.folder / f"layer_{layer:02d}.safetensors"

    def header(self, layer: int) -> bytes:
        """Return the safetensors header of a layer's file."""
        return mixed_header(self._tensors(layer))

    def entries(self, layer: int) -> dict[str, TensorEntry]:
        """Return the tensors of a layer's file by name. Raises ValueError if rows cannot be cut into nf4 blocks."""
        start = len(self.header(layer))
        found = {}
        for name, (word, shape) in self._tensors(layer).items():
            num_bytes = prod(shape) * ITEM_SIZES[word]
            found[name] = TensorEntry(name, word, shape, self.file(layer), start, num_bytes)
            start += num_bytes
        return found

    @cached_property
    def num_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(self.file_bytes(layer) for layer in range(self.architecture.num_layers))

    def file_bytes(self, layer: int) -> int:
        """Return the size of a layer's file."""
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
class QuantizedCache:
    """A complete cache that belongs to the base.

    fingerprint: the base's whole fingerprint. sources: CRC-32 of the experts' HF tensors, empty unless the base is an
    HF model. checksums: CRC-32 of the cache's own tensors. digest: equal on all ranks that see the same content.
    written: inode and time of the manifest, which change when the cache is made again.
    """

    files: Files
    fingerprint: str
    sources: Mapping[str, int]
    checksums: Mapping[str, int]
    digest: int
    written: tuple[int, int]


@dataclass(frozen=True)
class CacheLookup:
    """Result of a search: the cache, or None and the reason, which is empty if there is no folder."""

    cache: QuantizedCache | None
    why: str = ""


def identity(base: BaseDescription) -> dict[str, Any]:
    """Return values that show, without reading the experts, that a base has not changed since a cache was made.

    For a checkpoint: fingerprint, iteration and the CRC-32 of the iteration's `.metadata`, since Megatron-LM, which
    continues training in the same folder, leaves the fingerprint as it is. An HF model has no manifest: size and time
    of change of its files; the weights that every start reads are compared once they are read.
    """
    if base.weights is None:
        folder = newest_iteration(base.folder)
        metadata = f"{crc_of(folder / METADATA_NAME):08x}"
        return {"fingerprint": base.fingerprint, "iteration": folder.name, "metadata_crc32": metadata}
    stats = {file.name: file.stat() for file in base.weights.files}
    return {"files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def cast_dtype(stored: str, model: str) -> str:
    """Return the dtype of experts when they are quantized: the stored one, or the model's if it is less precise."""
    return stored if model in (stored, "float32") else model


def find_cache(base: BaseDescription, precision: str, dtype: str) -> CacheLookup:
    """Look for a usable cache of this base. dtype: see `cast_dtype`. Reads the manifest and the files' headers."""
    folder = cache_folder(base.folder, precision)
    if not folder.exists():
        return CacheLookup(None)
    try:
        manifest = read_manifest(folder, QuantizedCacheManifest)
        files = Files(folder, base.architecture, precision)
        why = _of_another(manifest, base, files, dtype) or next(iter(file_problems(files)), None)
        if why is None:
            return CacheLookup(_cache_of(manifest, files))
    except WeightsError as error:
        why = error.found or "; ".join(error.problems) or error.what
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
    return CacheLookup(None, why)


def _of_another(manifest: QuantizedCacheManifest, base: BaseDescription, files: Files, dtype: str) -> str | None:
    """Return how the manifest differs from what is wanted, None if it does not."""
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
    """Return a line for each file of the wrong size or with the wrong header."""
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


def _cache_of(manifest: QuantizedCacheManifest, files: Files) -> QuantizedCache:
    checksums = manifest.checksums
    for layer in range(files.architecture.num_layers):
        missing = files.entries(layer).keys() - checksums.keys()
        if missing:
            raise ValueError(f"no checksum of {min(missing)}")
    digest = zlib.crc32(json.dumps(manifest.values, sort_keys=True).encode())
    stat = (files.folder / MANIFEST_NAME).stat()
    written = (stat.st_ino, stat.st_mtime_ns)
    return QuantizedCache(files, manifest.base.fingerprint, manifest.source_checksums, checksums, digest, written)


def find_caches(base: BaseDescription) -> dict[str, CacheLookup]:
    """Look for the caches of a base in all precisions, whichever dtype they were made from."""
    found = {}
    for precision in BASE_PRECISIONS:
        folder = cache_folder(base.folder, precision)
        if is_kind(folder, KIND):
            found[precision] = find_cache(base, precision, str(read_values(folder).get("dtype")))
    return found


def check(cache: QuantizedCache, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Read every byte once; return a line for each tensor that differs from what was written."""
    problems = []
    for layer in range(cache.files.architecture.num_layers):
        sources = {name: source_of(entry) for name, entry in cache.files.entries(layer).items()}
        problems += checksum_problems(cache, sources, source_checksums(sources, advance=advance))
    return problems


def checksum_problems(cache: QuantizedCache, sources: Mapping[str, Source], found: Mapping[str, int]) -> list[str]:
    """Return a line for each tensor whose CRC-32 differs from the one that was recorded."""
    return [
        f"{sources[name].file.name}: {name}: expected CRC-32 {cache.checksums[name]:08x}; found {crc:08x}"
        for name, crc in found.items()
        if crc != cache.checksums[name]
    ]


def source_of(entry: TensorEntry) -> Source:
    """Return the place of a tensor's bytes."""
    return Source(entry.file, entry.start, entry.num_bytes)

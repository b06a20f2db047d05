"""CRC-32 of HF tensors, and the fingerprint of a model that follows from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from isal.isal_zlib import crc32

from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.hf.safetensors_files import Source
from mixtral_run.weights.mapping.hf_to_megatron import hf_tensors

BLOCK_BYTES = 8 * 2**20


def read_source(descriptor: int, source: Source, first: int, count: int) -> bytes:
    """Read `count` bytes of a tensor from its byte `first`. Raises WeightsError if the file ends before."""
    data = os.pread(descriptor, count, source.start + first)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), source.start + first + len(data))
        if not more:
            raise WeightsError("A weights file became shorter while it was read.", where=str(source.file))
        data += more
    return data


def tensor_checksums(
    weights: HFWeights, names: Iterable[str], *, workers: int = 2, advance: Callable[[int], None] = lambda _: None
) -> dict[str, int]:
    """Return the CRC-32 of the named tensors. advance: called with bytes read, from several threads."""
    return source_checksums({name: weights.sources[name] for name in names}, workers=workers, advance=advance)


def source_checksums(
    sources: Mapping[str, Source], *, workers: int = 2, advance: Callable[[int], None] = lambda _: None
) -> dict[str, int]:
    """Return the CRC-32 of tensors by place. Raises OSError if a file is missing, WeightsError if it is short."""

    def checksum(name: str) -> tuple[str, int]:
        source = sources[name]
        crc = 0
        descriptor = os.open(source.file, os.O_RDONLY)
        try:
            for first in range(0, source.num_bytes, BLOCK_BYTES):
                block = read_source(descriptor, source, first, min(BLOCK_BYTES, source.num_bytes - first))
                crc = crc32(block, crc)
                advance(len(block))
        finally:
            os.close(descriptor)
        return name, crc

    with ThreadPoolExecutor(workers, "checksum") as pool:
        return dict(pool.map(checksum, sources))


def quick_fingerprint(weights: HFWeights) -> str:
    """Return the QUICK half of the weights' fingerprint; only norms and routers are read."""
    checksums = tensor_checksums(weights, quick_names(weights.architecture))
    return quick_fingerprint_of_checksums(weights.architecture, weights.dtype, checksums)


def fingerprint(weights: HFWeights, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return the weights' whole fingerprint; every byte is read."""
    checksums = tensor_checksums(weights, weights.sources, advance=advance)
    return fingerprint_of_checksums(weights.architecture, weights.dtype, checksums)


def fingerprint_of_checksums(architecture: MixtralArchitecture, dtype: str, checksums: Mapping[str, int]) -> str:
    """Return `QUICK-WHOLE`, which identifies HF weights by content: hashes of the CRC-32 of their tensors.

    QUICK needs only the norms and routers, a few megabytes even at full size: enough to refuse another model before any
    work. WHOLE covers every tensor. Neither depends on shards, on the layout, or on how the experts were stored.
    """
    shapes = hf_tensors(architecture)
    lines = {name: f"{name} {dtype} {list(shape)} {checksums[name]:08x}\n" for name, shape in shapes.items()}
    return f"{_digest(lines[name] for name in quick_names(architecture))[:16]}-{_digest(lines.values())[:48]}"


def quick_fingerprint_of_checksums(architecture: MixtralArchitecture, dtype: str, checksums: Mapping[str, int]) -> str:
    """Return the QUICK half of the fingerprint from the checksums of `quick_names`."""
    shapes = hf_tensors(architecture)
    names = quick_names(architecture)
    return _digest(f"{name} {dtype} {list(shapes[name])} {checksums[name]:08x}\n" for name in names)[:16]


def quick_names(architecture: MixtralArchitecture) -> list[str]:
    """Return the HF tensors that QUICK covers: norms and routers."""
    return [
        name for name, shape in hf_tensors(architecture).items() if len(shape) == 1 or name.endswith(".gate.weight")
    ]


def _digest(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()

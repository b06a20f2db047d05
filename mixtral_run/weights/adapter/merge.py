"""Write HF weights with an adapter added: the same files, tensor by tensor, in one pass."""

from __future__ import annotations

import io
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from mixtral_run.errors import WeightsError
from mixtral_run.weights.adapter.lora_factors import Factors, as_bytes
from mixtral_run.weights.adapter.merge_journal import MergeJournal
from mixtral_run.weights.hf.fingerprint import read_source
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.hf.safetensors_files import INDEX_NAME, Source
from mixtral_run.weights.mapping.hf_to_megatron import hf_tensors

BLOCK_BYTES = 8 * 2**20


def merge_files(
    weights: HFWeights, factors: Factors, folder: Path, journal: MergeJournal, advance: Callable[[int], None]
) -> dict[str, int]:
    """Write every file of `weights` anew with `W + scale · B·A` for tensors with an adapter; others stay bit by bit.

    The sum is computed in fp32 and cast once. Files that the journal has are not written again. Returns the CRC-32 of
    the source tensors by name.
    """
    crcs: dict[str, int] = {}
    for file in weights.files:
        names = [name for name, source in weights.sources.items() if source.file == file]
        found = journal.finished(file.name, names)
        if found is None:
            found = _merge_file(weights, factors, file, names, folder / file.name, advance)
            journal.add(file.name, found)
        else:
            advance(sum(weights.sources[name].num_bytes for name in names))
        crcs |= found
    index = weights.directory / INDEX_NAME
    if index.is_file():
        shutil.copyfile(index, folder / INDEX_NAME)
    return crcs


def _merge_file(
    weights: HFWeights,
    factors: Factors,
    file: Path,
    names: list[str],
    target: Path,
    advance: Callable[[int], None],
) -> dict[str, int]:
    crcs: dict[str, int] = {}
    names.sort(key=lambda name: weights.sources[name].start)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with target.open("wb") as out:
            reached = 0
            for name in names:
                source = weights.sources[name]
                # The header, and tensors that are not part of the model.
                _copy(descriptor, Source(file, reached, source.start - reached), out)
                if name in factors.trained_also:
                    crcs[name] = _replace_tensor(weights, factors, name, descriptor, out, advance)
                elif name in factors.places:
                    crcs[name] = _merge_tensor(weights, factors, name, descriptor, out, advance)
                else:
                    crcs[name] = _copy(descriptor, source, out, advance)
                reached = source.start + source.num_bytes
            _copy(descriptor, Source(file, reached, file.stat().st_size - reached), out)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise WeightsError(
            "A file cannot be merged.",
            where=f"{file} → {target}",
            found=error.strerror,
            next_command=f"df -h {shlex.quote(str(target.parent.parent))}, then the same command again",
        ) from error
    finally:
        os.close(descriptor)
    return crcs


def _copy(descriptor: int, source: Source, out: object, advance: Callable[[int], None] = lambda _: None) -> int:
    crc = 0
    for first in range(0, source.num_bytes, BLOCK_BYTES):
        block = read_source(descriptor, source, first, min(BLOCK_BYTES, source.num_bytes - first))
        crc = crc32(block, crc)
        out.write(block)  # type: ignore[attr-defined]
        advance(len(block))
    return crc


def _merge_tensor(
    weights: HFWeights,
    factors: Factors,
    name: str,
    descriptor: int,
    out: object,
    advance: Callable[[int], None],
) -> int:
    source = weights.sources[name]
    rows, columns = hf_tensors(weights.architecture)[name]
    dtype = getattr(torch, weights.dtype)
    adding = Adding(factors, name, dtype)
    row_bytes = columns * weights.item_size
    crc = 0
    for start, stop in row_blocks(rows, row_bytes):
        block = bytearray(read_source(descriptor, source, start * row_bytes, (stop - start) * row_bytes))
        crc = crc32(block, crc)
        weight = torch.frombuffer(block, dtype=dtype).view(stop - start, columns)
        out.write(as_bytes(adding.to_rows(weight, start, stop)))  # type: ignore[attr-defined]
        advance(len(block))
    return crc


def _replace_tensor(
    weights: HFWeights, factors: Factors, name: str, descriptor: int, out: object, advance: Callable[[int], None]
) -> int:
    """Write a weight that was trained with the adapter in place of the source's, whose CRC-32 is returned."""
    crc = _copy(descriptor, weights.sources[name], io.BytesIO(), advance)
    out.write(as_bytes(factors.trained(name).to(getattr(torch, weights.dtype))))  # type: ignore[attr-defined]
    return crc


class Adding:
    """Adds `scale · B·A` to the rows of one HF tensor. The sum is computed in fp32 and cast once."""

    def __init__(self, factors: Factors, name: str, dtype: torch.dtype) -> None:
        self._a = factors.a(name).float()
        self._b = factors.b(name).float()
        self._scale = factors.scale(factors.places[name].module)
        self._dtype = dtype

    def to_rows(self, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the merged rows in the model's dtype. weight: rows start…stop [stop - start, columns]."""
        merged = torch.addmm(weight.float(), self._b[start:stop], self._a, alpha=self._scale)
        return merged.to(self._dtype)


def row_blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of rows that are merged at once; fixed, because a product's last bits may depend on them."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)

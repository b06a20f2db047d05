"""Cast tensors whose dtype is not the model's, so that everything after this module sees weights of one dtype.

The cast tensors are in a file in memory, which is read like any other: as ranges of bytes. They are few and small as a
rule, such as norms in fp32 in a model of bf16.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from mixtral_run.weights.hf.safetensors_files import DTYPES, ITEM_SIZES, TensorEntry

MOST_BYTES = 2 * 2**30
"""Largest size of the cast tensors together. Every process of a job has its own."""

_BLOCK_ELEMENTS = 2**23

_cast: dict[tuple[object, ...], dict[str, TensorEntry]] = {}
"""The cast tensors of the models that this process has opened. Their files exist as long as the process."""


class NotFiniteError(Exception):
    """A value is too large for the model's dtype."""


def bytes_to_cast(entries: Iterable[TensorEntry], dtype: str) -> int:
    """Return the size of the tensors of other dtypes once they are cast."""
    return sum(prod(entry.shape) * ITEM_SIZES[dtype] for entry in entries if entry.dtype != dtype)


def recast(entries: Mapping[str, TensorEntry], dtype: str) -> dict[str, TensorEntry]:
    """Return the tensors with those of other dtypes cast to `dtype`, safetensors' name of it, as torch casts them.

    Raises NotFiniteError if a finite value is infinite in that dtype, OSError if a file cannot be read.
    """
    others = [entry for entry in entries.values() if entry.dtype != dtype]
    stats = {file: file.stat() for file in {entry.file for entry in others}}
    key = (dtype, tuple(others), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats.values()))
    if key not in _cast:
        _cast[key] = _write(others, dtype)
    return {**entries, **{name: _cast[key][entry.name] for name, entry in entries.items() if entry.dtype != dtype}}


def _write(entries: list[TensorEntry], dtype: str) -> dict[str, TensorEntry]:
    descriptor = os.memfd_create("mixtral-run-cast")
    path = Path(f"/proc/self/fd/{descriptor}")
    found: dict[str, TensorEntry] = {}
    try:
        with os.fdopen(os.dup(descriptor), "wb") as out:
            for entry in entries:
                start = out.tell()
                _cast_one(entry, dtype, out)
                found[entry.name] = TensorEntry(entry.name, dtype, entry.shape, path, start, out.tell() - start)
    except BaseException:
        os.close(descriptor)
        raise
    return found


def _cast_one(entry: TensorEntry, dtype: str, out: object) -> None:
    import torch

    stored, wanted = getattr(torch, DTYPES[entry.dtype][0]), getattr(torch, DTYPES[dtype][0])
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        remaining = prod(entry.shape)
        while remaining:
            count = min(remaining, _BLOCK_ELEMENTS)
            block = bytearray(stream.read(count * ITEM_SIZES[entry.dtype]))
            values = torch.frombuffer(block, dtype=stored)
            cast = values.to(wanted)
            if bool((cast.isinf() & values.isfinite()).any()):
                raise NotFiniteError(f"{entry.file.name}: {entry.name}: has values that {DTYPES[dtype][0]} cannot hold")
            out.write(cast.view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
            remaining -= count

"""Write torch_dist checkpoints by torch alone, in any chunks: what the kit's readers are measured by."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]


def store(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    chunks: Mapping[str, Sequence[Box]] | None = None,
    *,
    transposed: bool = False,
) -> None:
    """Write FOLDER with these tensors. chunks: first index and shape of each chunk of a tensor; default: one.

    Even chunks of a tensor go to a.distcp, odd ones to b.distcp. transposed: the elements of matrices are stored column
    by column, which only torch reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"a.distcp": bytearray(), "b.distcp": bytearray()}
    described, places = {}, {}
    for key, tensor in tensors.items():
        boxes = (chunks or {}).get(key) or [((0,) * tensor.dim(), tuple(tensor.shape))]
        for number, (offset, shape) in enumerate(boxes):
            part = tensor[tuple(slice(at, at + length) for at, length in zip(offset, shape, strict=True))]
            stream = io.BytesIO()
            torch.save(part.T.contiguous().clone().T if transposed else part.contiguous().clone(), stream)
            file = "b.distcp" if number % 2 else "a.distcp"
            places[MetadataIndex(key, offset)] = _StorageInfo(file, len(files[file]), len(stream.getvalue()))
            files[file] += stream.getvalue()
        stored = [ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)) for offset, shape in boxes]
        described[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, stored)
    for name, content in files.items():
        if content:
            (folder / name).write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=places)))

"""The `.metadata` file of a torch_dist checkpoint: its tensors, and the file and position of each of their chunks.

torch pickles the file; restricted_pickle.py reads it without trusting it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.errors import WeightsError
from mixtral_run.weights.torch_dist.restricted_pickle import DisallowedGlobalError, UnpicklingError, load_metadata

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA_NAME = ".metadata"


@dataclass(frozen=True)
class StoredItem:
    """A chunk of a tensor, or an object (without a shape), with its file, position and length in bytes."""

    key: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    file: str
    start: int
    length: int


def read_metadata(folder: Path) -> Metadata:
    """Read the Metadata of an iteration's folder (`iter_…`).

    Raises WeightsError if there is none, if it is damaged, or if it would run something when it is unpickled.
    """
    path = folder / METADATA_NAME
    try:
        with path.open("rb") as stream:
            metadata = load_metadata(stream)
            if not metadata.storage_data:
                raise UnpicklingError("it names no files")
            return metadata
    except FileNotFoundError:
        raise WeightsError(
            "This is not a torch_dist checkpoint.", where=str(folder), expected=f"a {METADATA_NAME} file in it"
        ) from None
    except Exception as error:  # a damaged pickle raises anything, MemoryError and OverflowError among it
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> WeightsError:
    """Return the error for a metadata file that cannot be used."""
    if isinstance(error, DisallowedGlobalError):
        return hostile(str(path), error)
    return WeightsError(
        "The checkpoint's metadata cannot be read.", where=str(path), found=f"{type(error).__name__}: {error}"
    )


def hostile(where: str, error: DisallowedGlobalError) -> WeightsError:
    """Return the error for a file of a checkpoint whose pickle names something that it must not call."""
    return WeightsError(
        "A file of the checkpoint would run code when it is loaded; it is refused.",
        where=where,
        expected="a pickle of tensors and their places, as torch and Megatron write it",
        found=f"a pickle that calls {error.name}",
        next_command="ask whoever made the checkpoint; do not load it with other tools",
    )


def write_metadata(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, items: Iterable[StoredItem]) -> None:
    """Pickle the Metadata of items in files of the same folder. The same items give the same bytes."""
    import torch
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    properties = TensorProperties(dtype=getattr(torch, dtype))
    described: dict[str, Any] = {
        key: TensorStorageMetadata(properties, torch.Size(shape), []) for key, shape in shapes.items()
    }
    stored = {}
    for item in items:
        if item.shape is None or item.offset is None:
            described[item.key] = BytesStorageMetadata()
        else:
            chunk = ChunkStorageMetadata(torch.Size(item.offset), torch.Size(item.shape))
            described[item.key].chunks.append(chunk)
        stored[MetadataIndex(item.key, item.offset)] = _StorageInfo(item.file, item.start, item.length)
    metadata = Metadata(described, storage_data=stored, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    with path.open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())

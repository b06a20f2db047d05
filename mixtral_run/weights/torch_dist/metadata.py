"""The `.metadata` file of a torch_dist checkpoint: which tensors there are, and where their chunks lie.

torch pickles it. It is read without trusting it, since a pickle from elsewhere could run anything.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.errors import WeightsError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA_NAME = ".metadata"


@dataclass(frozen=True)
class StoredItem:
    """A chunk of a tensor, or an object (no shape), at its place in a file."""

    key: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    file: str
    start: int
    length: int


_SAFE = {
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool", "float8_e4m3fn"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
    "builtins": {"set", "frozenset"},
}


class _Ignored:
    """Takes the place of classes that only Megatron's own caching needs."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _enum_member(owner: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 pickle an enum member as: getattr(CLASS, NAME). No other attribute is handed out."""
    if owner is _Ignored:
        return _Ignored()
    if isinstance(owner, type) and issubclass(owner, Enum):
        return owner[name]
    raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) has no place in a checkpoint's metadata")


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what a `.metadata` file holds and nothing else: a pickle from elsewhere could otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron."):
            return _Ignored
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _SAFE.get(module, ()):
            return super().find_class(module, name)
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def read_metadata(folder: Path) -> Metadata:
    """The Metadata of a checkpoint's folder (`iter_…`). Raises WeightsError when there is none, or it is damaged."""
    path = folder / METADATA_NAME
    try:
        with path.open("rb") as stream:
            metadata: Metadata = _MetadataUnpickler(stream).load()
            if not metadata.storage_data:
                raise pickle.UnpicklingError("it names no files")
            return metadata
    except FileNotFoundError:
        raise WeightsError(
            "This is not a torch_dist checkpoint.", where=str(folder), expected=f"a {METADATA_NAME} file in it"
        ) from None
    except Exception as error:  # a damaged pickle raises anything, MemoryError and OverflowError among it
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> WeightsError:
    """What to say of a metadata file that does not hold what it should."""
    return WeightsError(
        "The checkpoint's metadata cannot be read.", where=str(path), found=f"{type(error).__name__}: {error}"
    )


def write_metadata(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, items: Iterable[StoredItem]) -> None:
    """Pickle the Metadata of items that lie in files of the same folder. The same items give the same bytes."""
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

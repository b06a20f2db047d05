"""Read and describe a torch_dist checkpoint without a process group, a model or Megatron.

`Reader` returns any rows of any global tensor, however it was cut into chunks when it was saved (any TP, EP or PP).
Only these bytes are read; the `.metadata` file has their places (metadata.py).
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mixtral_run.errors import WeightsError
from mixtral_run.weights.torch_dist.chunk_grid import are_disjoint_within, whole_numbers
from mixtral_run.weights.torch_dist.item_reader import FileSlice, NotPlainError, payload_start
from mixtral_run.weights.torch_dist.metadata import METADATA_NAME, StoredItem, hostile, read_metadata, unreadable
from mixtral_run.weights.torch_dist.restricted_pickle import DisallowedGlobalError, in_own_words

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

Bits = NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of the same size: they are compared and moved, never computed with."""

_BIT_TYPES: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class TensorInfo:
    """Global shape, dtype by torch's name, and bytes per element of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    item_size: int

    @property
    def num_bytes(self) -> int:
        """Return the size of the whole tensor."""
        return prod(self.shape) * self.item_size


class Reader:
    """Reader of an iteration's folder (`iter_…`). Raises WeightsError with everything that is missing from it.

    wanted: selects tensors by their keys; others are ignored. Reading is safe from several threads.
    """

    def __init__(self, folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> None:
        self.folder = folder
        self._wanted = wanted
        self.metadata = metadata = read_metadata(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.objects: set[str] = set()
        self._chunks: dict[str, list[StoredItem]] = {}
        self._payloads: dict[StoredItem, int] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self.num_chunks = 0
        self.files: set[str] = set()
        try:
            problems = self._read_items(metadata)
        except (AttributeError, TypeError, ValueError) as error:  # damaged, but still a pickle
            raise unreadable(folder / METADATA_NAME, error) from error
        if problems:
            from mixtral_run.errors import shortened

            raise WeightsError(
                "The checkpoint cannot be used.",
                where=str(folder),
                problems=shortened(problems),
                next_command="copy it again from where it was made, or run mixtral-run convert again",
            )

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _read_items(self, metadata: Metadata) -> list[str]:
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        infos: dict[tuple[str, tuple[int, ...] | None], _StorageInfo] = {}
        for index, info in metadata.storage_data.items():
            offset = None if index.offset is None else whole_numbers(index.offset)
            whole_numbers((info.offset, info.length))
            if type(index.fqn) is not str or type(info.relative_path) is not str or (index.fqn, offset) in infos:
                raise ValueError("a key or a file's name is not a text, or a part has two places")
            infos[(index.fqn, offset)] = info
        reached: dict[str, int] = {}
        problems = []
        for info in infos.values():
            reached[info.relative_path] = max(reached.get(info.relative_path, 0), info.offset + info.length)
        self.files = set(reached)
        for file, expected in sorted(reached.items()):
            path = self.folder / file
            if Path(file).name != file or not file.isprintable():
                problems.append(f"{METADATA_NAME}: {file!r} is not a file of this folder")
            elif not path.is_file():
                problems.append(f"{file}: missing ({expected:,} bytes)")
            elif path.stat().st_size < expected:
                problems.append(f"{file}: truncated: expected {expected:,} bytes; found {path.stat().st_size:,}")
        for key, stored in metadata.state_dict_metadata.items():
            if type(key) is not str or not key.isprintable():
                raise ValueError("the name of a tensor is not a printable text")
            if isinstance(stored, BytesStorageMetadata):
                self.objects.add(key)
                if (key, None) not in infos:
                    problems.append(f"{METADATA_NAME}: {key} has no place in a file")
                continue
            if self._wanted(key):
                problems += self._read_tensor(key, stored, infos)
        return problems

    def _read_tensor(self, key: str, stored: TensorStorageMetadata, infos: Mapping[Any, _StorageInfo]) -> list[str]:
        import torch

        if type(stored.properties.dtype) is not torch.dtype:
            raise TypeError(f"the dtype of {key} is none of torch's")
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        shape = whole_numbers(stored.size)
        self.tensors[key] = TensorInfo(shape, dtype, stored.properties.dtype.itemsize)
        items = []
        for chunk in stored.chunks:
            offset = whole_numbers(chunk.offsets)
            info = infos.get((key, offset))
            if info is None:
                return [f"{METADATA_NAME}: {key} at {list(chunk.offsets)} has no place in a file"]
            place = (info.relative_path, info.offset, info.length)
            items.append(StoredItem(key, offset, whole_numbers(chunk.sizes), *place))
        covered = sum(prod(item.shape or ()) for item in items)
        if covered != prod(shape):
            return [f"{METADATA_NAME}: {key}: chunks hold {covered:,} of {prod(shape):,} elements"]
        if not are_disjoint_within(shape, [(item.offset or (), item.shape or ()) for item in items]):
            return [f"{METADATA_NAME}: {key}: chunks overlap, or reach beyond the tensor"]
        self._chunks[key] = sorted(items, key=lambda item: item.offset or ())
        self.num_chunks += len(items)
        return []

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors together; the files are a little larger."""
        return sum(info.num_bytes for info in self.tensors.values())

    def rename(self, key: str, name: str) -> None:
        """Rename a tensor."""
        self.tensors[name] = self.tensors.pop(key)
        self._chunks[name] = [dataclasses.replace(item, key=name) for item in self._chunks.pop(key)]

    def layout_of(self, key: str, axis: int) -> int:
        """Return the number of parts into which a tensor was cut along an axis."""
        return len({item.offset[axis] for item in self._chunks[key] if item.offset is not None})

    def chunks(self, key: str) -> Sequence[StoredItem]:
        """Return the chunks of a tensor, ordered by their offsets."""
        return self._chunks[key]

    def rows(self, key: str, leading: tuple[int, ...], start: int, stop: int) -> Bits:
        """Read rows start…stop of the matrix at `leading` (layer, expert) → bits [stop - start, columns].

        A tensor without a row axis, such as a norm, is one row.
        """
        info = self.tensors[key]
        out = np.empty((stop - start, info.shape[-1]), _BIT_TYPES[info.item_size])
        filled = 0
        for item in self._chunks[key]:
            assert item.offset is not None and item.shape is not None
            offset, size = _as_matrices(item.offset, len(leading), 0), _as_matrices(item.shape, len(leading), 1)
            within = [index - first for index, first in zip(leading, offset, strict=False)]
            if any(not 0 <= index < length for index, length in zip(within, size, strict=False)):
                continue
            first, last = max(start, offset[-2]), min(stop, offset[-2] + size[-2])
            if first >= last:
                continue
            matrix = 0
            for index, length in zip(within, size, strict=False):
                matrix = matrix * length + index
            begin = (matrix * size[-2] + first - offset[-2]) * size[-1]
            count = (last - first) * size[-1]
            block = self._elements(item, begin, count, info.item_size).reshape(last - first, size[-1])
            out[first - start : last - start, offset[-1] : offset[-1] + size[-1]] = block
            filled += count
        if filled != out.size:
            raise WeightsError(
                "The checkpoint's chunks do not cover a tensor.", where=str(self.folder), found=f"{key} {leading}"
            )
        return out

    def matrix(self, key: str, leading: tuple[int, ...] = ()) -> Bits:
        """Read the whole matrix (or vector, as one row) at `leading`."""
        shape = self.tensors[key].shape[len(leading) :]
        return self.rows(key, leading, 0, shape[0] if len(shape) == 2 else 1)

    def file_of(self, key: str, leading: tuple[int, ...], row: int) -> str:
        """Return the name of the first file that holds a part of this row."""
        for item in self._chunks[key]:
            assert item.offset is not None and item.shape is not None
            offset, size = _as_matrices(item.offset, len(leading), 0), _as_matrices(item.shape, len(leading), 1)
            place = (*leading, row)
            if all(o <= p < o + s for p, o, s in zip(place, offset, size, strict=False)):
                return item.file
        return "?"

    def payload(self, item: StoredItem, block_bytes: int) -> Iterator[bytes]:
        """Yield a chunk's bytes, block by block."""
        assert item.shape is not None
        start = self._payload_start(item)
        num_bytes = prod(item.shape) * self.tensors[item.key].item_size
        for first in range(0, num_bytes, block_bytes):
            wanted = min(block_bytes, num_bytes - first)
            block = os.pread(self._descriptor(item.file), wanted, start + first)
            if len(block) != wanted:
                raise self.broken(item, "the file ends within the tensor")
            yield block

    def _elements(self, item: StoredItem, first: int, count: int, item_size: int) -> Bits:
        buffer = bytearray(count * item_size)
        position = self._payload_start(item) + first * item_size
        view = memoryview(buffer)
        done = 0
        while done < len(buffer):
            read = os.preadv(self._descriptor(item.file), [view[done:]], position + done)
            if read == 0:
                raise self.broken(item, "the file ends within the tensor")
            done += read
        return np.frombuffer(buffer, _BIT_TYPES[item_size])

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._descriptors[file]

    def payload_start(self, item: StoredItem) -> int:
        """Return the position of a chunk's first element in its file. The torch.save framing is checked.

        Raises NotPlainError if the elements are not stored contiguously and as they are, WeightsError if the chunk's
        pickle would run something.
        """
        if item not in self._payloads:
            assert item.shape is not None
            view = FileSlice(self._descriptor(item.file), item.start, item.length)
            try:
                start = payload_start(view, item.shape, self.tensors[item.key].dtype)
            except DisallowedGlobalError as error:
                raise hostile(self._place_of(item), error) from error
            self._payloads[item] = item.start + start
        return self._payloads[item]

    def _payload_start(self, item: StoredItem) -> int:
        try:
            return self.payload_start(item)
        except NotPlainError as error:
            raise self.broken(item, str(error)) from error

    def _place_of(self, item: StoredItem) -> str:
        return f"{self.folder / item.file}, bytes {item.start:,} to {item.start + item.length:,}"

    def refused(self, item: StoredItem, error: Exception) -> WeightsError:
        """Return the error for a chunk that torch could not read or refused to."""
        error = in_own_words(error)
        if isinstance(error, DisallowedGlobalError):
            return hostile(self._place_of(item), error)
        return self.broken(item, f"{type(error).__name__}: {error}".splitlines()[0])

    def broken(self, item: StoredItem, found: str) -> WeightsError:
        """Return the error for a chunk that cannot be read."""
        return WeightsError(
            "A tensor of the checkpoint is not stored as it should be.",
            where=self._place_of(item),
            expected=f"{item.key} {item.shape}, contiguous, as torch.save writes it",
            found=found,
        )


def _as_matrices(numbers: tuple[int, ...], num_leading: int, missing: int) -> tuple[int, ...]:
    """Insert the row axis of a vector."""
    return numbers if len(numbers) - num_leading == 2 else (*numbers[:-1], missing, numbers[-1])

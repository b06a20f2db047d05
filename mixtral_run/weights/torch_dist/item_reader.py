"""Find a tensor's bytes within an item of a .distcp file, and check that they can be read without torch.

Items of item_writer.py are recognized by their first page; items of torch.save are examined as a zip and a pickle.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from functools import lru_cache
from math import prod
from typing import Any

from mixtral_run.weights.torch_dist import item_writer
from mixtral_run.weights.torch_dist.restricted_pickle import DisallowedGlobalError, load_tensor

_HEADER_BYTES = 30


class NotPlainError(Exception):
    """Raised if an item does not hold the tensor's elements contiguously and as they are; the message says why."""


class FileSlice(io.RawIOBase):
    """A part of an open file as a file of its own, read by position: no state is shared with other readers."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor_number, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        read = os.preadv(self._descriptor_number, [view], self._start + self._at) if len(view) else 0
        self._at += read
        return read

    def read(self, size: int | None = -1) -> bytes:
        remaining = max(0, self._length - self._at)
        wanted = remaining if size is None or size < 0 else min(size, remaining)
        data = os.pread(self._descriptor_number, wanted, self._start + self._at) if wanted else b""
        self._at += len(data)
        return data


def payload_start(item: FileSlice, shape: tuple[int, ...], dtype: str) -> int:
    """Return the position in bytes of the first element of a contiguous tensor of this shape and dtype in an item.

    Raises NotPlainError for anything else that the item may hold, DisallowedGlobalError for a pickle that would run
    something, OSError where it cannot be read.
    """
    if _is_of_this_kit(item, shape, dtype):
        return item_writer.PAGE
    try:
        return _start_in_zip(item, shape, dtype)
    except (DisallowedGlobalError, NotPlainError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged zip or pickle raises anything, AssertionError among it
        raise NotPlainError(f"{type(error).__name__}: {error}") from error


def _is_of_this_kit(item: FileSlice, shape: tuple[int, ...], dtype: str) -> bool:
    expected = _expected(shape, dtype)
    if expected is None:
        return False
    head, crc_at, length = expected
    item.seek(0, os.SEEK_END)
    if item.tell() != length:
        return False
    item.seek(0)
    found = item.read(len(head))
    after = crc_at + 4
    return found[:crc_at] == head[:crc_at] and found[after:] == head[after:]


@lru_cache(maxsize=256)
def _expected(shape: tuple[int, ...], dtype: str) -> tuple[bytes, int, int] | None:
    """Return the head that item_writer.py writes for a tensor, the position of its CRC-32, and the item's length."""
    import torch

    try:
        frame = item_writer.frame(shape, dtype, getattr(torch, dtype).itemsize)
    except (KeyError, ValueError):  # none that it writes
        return None
    head = frame.head(0)
    name = b"archive/data/0"
    return head, head.rindex(name) - _HEADER_BYTES + 14, frame.length


def _start_in_zip(item: FileSlice, shape: tuple[int, ...], dtype: str) -> int:
    import torch

    # First of all, so that what would run something is refused as such, whatever else is wrong with it.
    item.seek(0)
    stream = io.BufferedReader(item)
    tensor = load_tensor(stream, "meta")
    stream.detach()
    with zipfile.ZipFile(item) as archive:
        (entry,) = [each for each in archive.infolist() if each.filename.endswith("/data/0")]
    if not isinstance(tensor, torch.Tensor):
        raise NotPlainError(f"a {type(tensor).__name__}")
    if not tensor.is_contiguous() or tensor.storage_offset() or tuple(tensor.shape) != shape:
        raise NotPlainError(f"shape {list(tensor.shape)}, stride {list(tensor.stride())}")
    stored = str(tensor.dtype).removeprefix("torch.")
    if stored != dtype:
        raise NotPlainError(f"dtype {stored}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != prod(shape) * tensor.dtype.itemsize:
        raise NotPlainError(f"{entry.file_size:,} bytes, compression method {entry.compress_type}")
    item.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", item.read(4))
    start: int = entry.header_offset + _HEADER_BYTES + name_length + extra_length
    return start

"""Write a tensor in the format of torch.save without having it: a head and a tail of known length around raw bytes.

A .distcp file is a sequence of such items (torch 2, distributed/checkpoint/filesystem.py,
SerializationFormat.TORCH_SAVE). Each is a zip of stored entries: `data.pkl` has shape, stride and dtype, `data/0` the
bytes. Because the lengths are known beforehand, any worker can write an item anywhere in its file, straight from the
source.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

PAGE = 4096
"""Alignment in the file of items and of their bytes, so that whole pages can be copied between files."""

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LARGEST = 2**32 - 2  # beyond it a zip needs 64-bit fields; Mixtral's largest chunk is an eighth of that
_STORAGES = {"bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage"}


@dataclass(frozen=True)
class Frame:
    """The framing of an item around its bytes. Numbers are bytes from the item's start."""

    small_entries: tuple[tuple[str, bytes], ...]
    num_bytes: int

    @property
    def payload_start(self) -> int:
        return PAGE

    @property
    def length(self) -> int:
        """Return the length of the whole item."""
        return PAGE + self.num_bytes + len(self.tail(0))

    def head(self, crc: int) -> bytes:
        """Return the part before the bytes. crc: CRC-32 of the bytes."""
        parts = bytearray()
        for name, content in self.small_entries:
            parts += _local_header(name, zlib.crc32(content), len(content), 0) + content
        bare = len(parts) + len(_local_header("archive/data/0", 0, 0, 0))
        # The format lets an entry's header carry a field that readers skip; it fills the page.
        return bytes(parts + _local_header("archive/data/0", crc, self.num_bytes, PAGE - bare))

    def tail(self, crc: int) -> bytes:
        """Return the part after the bytes, which is the zip's directory. crc: CRC-32 of the bytes."""
        directory = bytearray()
        at = 0
        for name, content in self.small_entries:
            directory += _central_header(name, zlib.crc32(content), len(content), at)
            at += len(_local_header(name, 0, 0, 0)) + len(content)
        directory += _central_header("archive/data/0", crc, self.num_bytes, at)
        count = len(self.small_entries) + 1
        end = _END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), PAGE + self.num_bytes, 0)
        return bytes(directory + end)


def frame(shape: tuple[int, ...], dtype: str, item_size: int) -> Frame:
    """Return the frame of a contiguous tensor. Raises ValueError for one of 4 GiB or more."""
    num_bytes = prod(shape) * item_size
    if num_bytes > _LARGEST:
        raise ValueError(f"a chunk of {num_bytes:,} bytes; the largest that can be framed has {_LARGEST:,}")
    return Frame(
        (
            ("archive/data.pkl", _pickled_tensor(shape, dtype)),
            ("archive/byteorder", b"little"),
            ("archive/version", b"3\n"),
        ),
        num_bytes,
    )


def _local_header(name: str, crc: int, size: int, extra_size: int) -> bytes:
    extra = b"FB" + struct.pack("<H", extra_size - 4) + b"Z" * (extra_size - 4) if extra_size else b""
    encoded = name.encode()
    return _LOCAL.pack(b"PK\x03\x04", 0, 0, 0, 0, 0, crc, size, size, len(encoded), len(extra)) + encoded + extra


def _central_header(name: str, crc: int, size: int, start: int) -> bytes:
    encoded = name.encode()
    fields = (0, 0, 0, 0, 0, 0, crc, size, size, len(encoded), 0, 0, 0, 0, 0, start)
    return _CENTRAL.pack(b"PK\x01\x02", *fields) + encoded


class _Storage:
    """Stand-in for the storage while a tensor's description is pickled; it becomes a persistent id."""


@dataclass(frozen=True)
class _Description:
    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        stride = tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return (torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict()))


def _pickled_tensor(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return data.pkl as torch.save writes it (torch/serialization.py, _save; protocol 2)."""
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, _Storage):
                return ("storage", getattr(torch, _STORAGES[dtype]), "0", "cpu", prod(shape))
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(_Description(_Storage(), shape))
    return stream.getvalue()

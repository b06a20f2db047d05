"""One tensor as torch.save writes it, without the tensor: a head and a tail of known length around raw bytes.

A .distcp file is a row of such items (torch 2, distributed/checkpoint/filesystem.py, SerializationFormat.TORCH_SAVE).
Each is a zip of stored entries: `data.pkl` says shape, stride and dtype, `data/0` is the bytes. With the lengths known
beforehand, an item can be written anywhere in its file, by any worker, and its bytes come straight from the source.
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
"""Items start, and their bytes lie, at multiples of this in the file: whole pages can go from file to file."""

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LARGEST = 2**32 - 2  # beyond it a zip needs 64-bit fields; Mixtral's largest chunk is an eighth of that
_STORAGES = {"bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage"}


@dataclass(frozen=True)
class Frame:
    """Where the bytes of an item lie within it, and what goes around them. Numbers are bytes from the item's start."""

    small_entries: tuple[tuple[str, bytes], ...]
    num_bytes: int

    @property
    def payload_start(self) -> int:
        return PAGE

    @property
    def length(self) -> int:
        """The whole item's."""
        return PAGE + self.num_bytes + len(self.tail(0))

    def head(self, crc: int) -> bytes:
        """What comes before the bytes; `crc` is their CRC-32."""
        parts = bytearray()
        for name, content in self.small_entries:
            parts += _local_header(name, zlib.crc32(content), len(content), 0) + content
        bare = len(parts) + len(_local_header("archive/data/0", 0, 0, 0))
        # The format lets an entry's header carry a field that readers skip; it fills the page.
        return bytes(parts + _local_header("archive/data/0", crc, self.num_bytes, PAGE - bare))

    def tail(self, crc: int) -> bytes:
        """What comes after the bytes: the zip's directory."""
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
    """The frame of a contiguous tensor. Raises ValueError for one of 4 GiB or more."""
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
    """Stands for the storage while a tensor's description is pickled; becomes a persistent id."""


@dataclass(frozen=True)
class _Description:
    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        stride = tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return (torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict()))


def _pickled_tensor(shape: tuple[int, ...], dtype: str) -> bytes:
    """data.pkl as torch.save has it (torch/serialization.py, _save; protocol 2)."""
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, _Storage):
                return ("storage", getattr(torch, _STORAGES[dtype]), "0", "cpu", prod(shape))
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(_Description(_Storage(), shape))
    return stream.getvalue()

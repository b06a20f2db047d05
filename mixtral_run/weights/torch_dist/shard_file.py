"""Write the tensors of one process as a .distcp file, in several threads, and return the file's checksum.

torch's own writer copies, frames and writes one tensor after another in one thread, and the file has to be read again
for its checksum. Here the place of each tensor in the file is known beforehand (item_writer.py). On tmpfs one thread
would get 0.6 GB/s (io/mmap_writer.py).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from isal.isal_zlib import crc32, crc32_combine
from torch import Tensor

from mixtral_run.weights.io.daemon_threads import map_in_daemons
from mixtral_run.weights.io.disk import allocate, is_in_memory
from mixtral_run.weights.io.host_parts import ToHost, host_parts
from mixtral_run.weights.io.mmap_writer import MappedWriter
from mixtral_run.weights.io.pwrite import write_whole
from mixtral_run.weights.torch_dist.item_writer import PAGE, Frame, frame

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_RUN_BYTES = 16 * 2**20
"""Bytes of neighboring items that one thread writes at a time, about."""


@dataclass(frozen=True)
class Place:
    """The item of a tensor in the file: its first byte and its length."""

    start: int
    length: int


@dataclass(frozen=True)
class _Item:
    tensor: Tensor
    frame: Frame
    start: int

    @property
    def end(self) -> int:
        """Return the end of its pages, where the next item begins."""
        return self.start + -(-self.frame.length // PAGE) * PAGE


def can_write(tensors: Sequence[Tensor]) -> bool:
    """Return True if `write_shards` can write these tensors. Integers and tensors of 4 GiB and more it cannot."""
    try:
        _placed(tensors)
    except ValueError:
        return False
    return True


def write_shards(file: Path, tensors: Sequence[Tensor], threads: int) -> tuple[list[Place], int]:
    """Write a file, wait until it is on the disk, and return the place of each tensor and the file's CRC-32.

    The checksum is that of the bytes that were handed to the system.

    Args:
        file: is replaced if it exists.
        tensors: on any device; what computes them must have ended.
        threads: that copy and write, at most.

    Raises:
        OSError: The file cannot be written.
    """
    items = _placed(tensors)
    length = items[-1].end if items else 0
    runs = [list(run) for _, run in itertools.groupby(items, key=lambda each: each.start // _RUN_BYTES)]
    is_mapped = is_in_memory(file.parent)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.ftruncate(descriptor, length)
        if length and not is_mapped:
            allocate(descriptor, 0, length)
        # Not a pool: its threads would keep a process whose disk does not answer.
        sums = map_in_daemons(lambda run: _write_run(descriptor, run, is_mapped=is_mapped), runs, threads, "save")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    crc = 0
    for run, own_crc in zip(runs, sums, strict=True):
        crc = crc32_combine(crc, own_crc, run[-1].end - run[0].start)
    return [Place(each.start, each.frame.length) for each in items], crc


def _placed(tensors: Sequence[Tensor]) -> list[_Item]:
    """Return the items of the tensors, one after another. Raises ValueError if one cannot be written."""
    items: list[_Item] = []
    for tensor in tensors:
        start = items[-1].end if items else 0
        items.append(_Item(tensor, _frame(tuple(tensor.shape), tensor.dtype), start))
    return items


@lru_cache(maxsize=1024)
def _frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    if dtype not in _DTYPES:
        raise ValueError(f"no frame for {dtype}")
    return frame(shape, str(dtype).removeprefix("torch."), dtype.itemsize)


def _write_run(descriptor: int, run: Sequence[_Item], *, is_mapped: bool) -> int:
    """Write neighboring items, and return the CRC-32 of their bytes and of the zeros between them."""
    limits = run[0].start, run[-1].end
    to_host = ToHost()
    writer = MappedWriter() if is_mapped else None

    def put(position: int, part: bytes | memoryview) -> None:
        if writer is None or not writer.write(descriptor, limits, position, part):
            write_whole(descriptor, position, part)

    crc = 0
    for item in run:
        own_crc, position = 0, item.start + item.frame.payload_start
        for part in host_parts(item.tensor.detach(), to_host):
            data = part.view(torch.uint8).numpy().data
            own_crc = crc32(data, own_crc)
            put(position, data)
            position += len(data)
        # The head contains the checksum of the data, so the head comes last.
        head, tail = item.frame.head(own_crc), item.frame.tail(own_crc)
        tail += bytes(item.end - item.start - item.frame.length)
        put(position, tail)
        put(item.start, head)
        crc = crc32_combine(crc32(head, crc), own_crc, item.frame.num_bytes)
        crc = crc32(tail, crc)
    if writer is not None:
        writer.release()
    return crc

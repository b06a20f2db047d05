"""Load an HF directory without converting it: each rank reads its own slices directly into its parameters.

Every start repeats what a conversion does once: the mapping is the same, so the parameters are equal bit by bit. Every
byte is checksummed as it is read; the ranks combine their checksums into the fingerprint that a converted checkpoint
would have, so that an adapter fits both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from isal.isal_zlib import crc32, crc32_combine

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.hf.safetensors_files import Source
from mixtral_run.weights.io.pace import num_cores
from mixtral_run.weights.io.pread import read_whole
from mixtral_run.weights.mapping.hf_to_megatron import Shape
from mixtral_run.weights.mapping.row_index import Slice, slice_index

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 32 * 2**20
"""Bytes that one worker reads at a time: small enough that all finish together, large enough for read-ahead."""

BLOCK_BYTES = 2 * 2**20
"""Bytes that are read and checksummed at once into memory of the host: they stay in the processor's cache."""

UPLOAD_BYTES = 8 * 2**20
"""Bytes that are read, checksummed and sent to a GPU at once, in one of two pinned buffers. Smaller blocks are slower:
the interpreter runs one thread at a time, and each waits for its turn after every step, which costs more than the
misses of the processor's cache."""


@dataclass(frozen=True)
class Target:
    """A rank's part of a Megatron tensor: its offset and shape in the global tensor, and the memory to fill.

    data: contiguous, with as many elements as `shape`; dtype and device are the model's.
    """

    key: str
    offset: Shape
    shape: Shape
    data: Tensor


@dataclass(frozen=True)
class PartSum:
    """CRC-32 of a run of bytes of an HF tensor."""

    source: str
    start: int
    num_bytes: int
    crc: int


@dataclass(frozen=True)
class Part:
    """Rows to read, and this rank's matrix to fill. place: of the whole tensor; dtype: of the stored elements."""

    rows: Slice
    place: Source
    dtype: torch.dtype
    matrix: Tensor  # [rows, columns] of the target

    @property
    def row_bytes(self) -> int:
        return self.rows.columns * self.dtype.itemsize

    @property
    def start(self) -> int:
        """Return the position of the first byte in the file."""
        return self.place.start + self.rows.first_row * self.row_bytes

    @property
    def num_bytes(self) -> int:
        return self.rows.num_rows * self.row_bytes

    @property
    def is_run(self) -> bool:
        """Return True if the bytes in the file are those of the target, in the same order."""
        return self.rows.is_whole_rows and self.matrix.dtype == self.dtype and self.matrix.is_contiguous()

    @property
    def bytes_of_target(self) -> Tensor:
        """Return the target's bytes of a part that `is_run`, uint8 [num_bytes]."""
        first = self.rows.target_row * self.row_bytes
        return self.matrix.view(-1).view(torch.uint8)[first : first + self.num_bytes]


class _Stopped(Exception):
    """Raised in a worker after another one failed or the user interrupted."""


def read_into(
    weights: HFWeights,
    targets: Iterable[Target],
    *,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[PartSum]:
    """Fill the targets from the HF files in several threads; return the checksums of the bytes that were read.

    advance: called with bytes read, from several threads. Raises WeightsError if a file cannot be read to its end.
    """
    return read_parts(_parts(weights, targets), workers=workers, advance=advance)


def read_parts(
    parts: Iterable[Part], *, workers: int | None = None, advance: Callable[[int], None] = lambda _: None
) -> list[PartSum]:
    """Fill the parts' matrices from their files; otherwise as `read_into`."""
    remaining = iter(sorted((each for part in parts for each in _cut(part)), key=_place))
    lock, stop = threading.Lock(), threading.Event()
    count = workers or default_workers()

    def work() -> list[PartSum]:
        sums: list[PartSum] = []
        try:
            with _Reader(stop, advance) as reader:
                while True:
                    with lock:
                        part = next(remaining, None)
                    if part is None:
                        return sums
                    sums.append(reader.read(part))
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(count, "load") as pool:
        futures = [pool.submit(work) for _ in range(count)]
        try:
            errors = [error for future in futures if (error := future.exception()) is not None]
        finally:
            # Also on Ctrl-C: leaving the pool waits for its threads.
            stop.set()
    for error in sorted(errors, key=lambda each: isinstance(each, _Stopped)):
        raise error
    return [each for future in futures for each in future.result()]


def default_workers() -> int:
    """Return the number of threads: the machine's cores divided by its processes, at least two since most wait.

    From memory a thread reads 1.7 GB/s on machines with many cores, independently of the others (docs/benchmarks.md).
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(16, num_cores() // processes))


def checksums_of(sources: Mapping[str, Source], sums: Iterable[PartSum]) -> dict[str, int]:
    """Combine the ranks' checksums into the CRC-32 of each tensor, which they must have read completely between them.

    Raises WeightsError if two ranks read different bytes at the same place.
    """
    found: dict[str, dict[int, PartSum]] = {}
    for each in sums:
        known = found.setdefault(each.source, {}).setdefault(each.start, each)
        if known != each:
            raise WeightsError(
                "The HF weights changed while they were read, or the disk gave different bytes.",
                where=f"{sources[each.source].file}, {each.source}",
                expected=f"CRC-32 {known.crc:08x} of {known.num_bytes:,} bytes, as another process read",
                found=f"CRC-32 {each.crc:08x} of {each.num_bytes:,} bytes",
                next_command="the same command again; then dmesg, which reports disk errors",
            )
    checksums = {}
    for name, parts in found.items():
        ordered = [parts[start] for start in sorted(parts)]
        reached = 0
        for part in ordered:
            assert part.start == reached, f"{name}: bytes {reached} to {part.start} belong to no rank"
            reached += part.num_bytes
        assert reached == sources[name].num_bytes, f"{name}: bytes from {reached} on belong to no rank"
        whole = 0
        for part in ordered:
            whole = crc32_combine(whole, part.crc, part.num_bytes)
        checksums[name] = whole
    return checksums


def _parts(weights: HFWeights, targets: Iterable[Target]) -> Iterator[Part]:
    """Yield the rows that this rank has to read."""
    index = slice_index(weights.architecture)
    dtype: torch.dtype = getattr(torch, weights.dtype)
    for target in targets:
        matrix = target.data.view(-1, target.shape[-1])
        for rows in index.slices(target.key, target.offset, target.shape):
            yield Part(rows, weights.sources[rows.source], dtype, matrix)


def _cut(part: Part) -> Iterator[Part]:
    for rows in part.rows.parts(PART_BYTES // part.row_bytes):
        yield replace(part, rows=rows)


def _place(part: Part) -> tuple[str, int]:
    return part.place.file.name, part.start


class _Reader:
    """Reader with the descriptors and buffers of one thread."""

    def __init__(self, stop: threading.Event, advance: Callable[[int], None]) -> None:
        self._stop = stop
        self._advance = advance
        self._descriptors: dict[Path, int] = {}
        self._uploads: dict[torch.device, _Upload] = {}
        self._staging = bytearray()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        for upload in self._uploads.values():
            upload.wait()

    def read(self, part: Part) -> PartSum:
        """Fill the part's rows; whole rows are checksummed, whichever columns are needed."""
        rows = part.rows
        descriptor = self._open(part.place.file)
        os.posix_fadvise(descriptor, part.start, part.num_bytes, os.POSIX_FADV_WILLNEED)
        on_gpu = part.matrix.device.type == "cuda"
        if on_gpu and part.is_run:
            crc = self._upload(part, descriptor)
        else:
            crc = 0
            for block in rows.parts((UPLOAD_BYTES if on_gpu else BLOCK_BYTES) // part.row_bytes):
                cut = replace(part, rows=block)
                crc = self._fill(cut, descriptor, crc)
                self._passed(cut.num_bytes)
        return PartSum(rows.source, rows.first_row * part.row_bytes, part.num_bytes, crc)

    def _passed(self, num_bytes: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._advance(num_bytes)

    def _upload(self, part: Part, descriptor: int) -> int:
        """Send a run of bytes to a GPU in as few steps as possible, since all threads share the interpreter."""
        file, position, target, crc = part.place.file, part.start, part.bytes_of_target, 0
        upload = self._upload_to(part.matrix.device)
        for first in range(0, part.num_bytes, UPLOAD_BYTES):
            count = min(UPLOAD_BYTES, part.num_bytes - first)
            buffer, view = upload.next_buffer(count)
            crc = _read_and_sum(descriptor, view[:count], position + first, file, crc, UPLOAD_BYTES)
            upload.send_run(buffer[:count], target[first : first + count])
            self._passed(count)
        return crc

    def _upload_to(self, device: torch.device) -> _Upload:
        if device not in self._uploads:
            self._uploads[device] = _Upload(device)
        return self._uploads[device]

    def _fill(self, part: Part, descriptor: int, crc: int) -> int:
        block, file, position, dtype = part.rows, part.place.file, part.start, part.dtype
        into = part.matrix[block.target_row : block.target_row + block.num_rows]
        num_bytes = part.num_bytes
        if into.device.type == "cuda":
            upload = self._upload_to(into.device)
            buffer, view = upload.next_buffer(num_bytes)
            crc = _read_and_sum(descriptor, view[:num_bytes], position, file, crc, UPLOAD_BYTES)
            upload.send(buffer[:num_bytes].view(dtype).view(-1, block.columns), into, block)
            return crc
        if part.is_run:
            view = part.bytes_of_target.numpy().data.cast("B")
            return _read_and_sum(descriptor, view, position, file, crc, BLOCK_BYTES)
        if len(self._staging) < num_bytes:
            self._staging = bytearray(num_bytes)
        view = memoryview(self._staging)[:num_bytes]
        crc = _read_and_sum(descriptor, view, position, file, crc, BLOCK_BYTES)
        matrix = torch.frombuffer(view, dtype=dtype).view(-1, block.columns)
        into.copy_(matrix[:, block.first_column : block.first_column + block.num_columns])
        return crc

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise WeightsError("A weights file cannot be read.", where=str(file), found=error.strerror) from error
        return self._descriptors[file]


def _read_and_sum(descriptor: int, view: memoryview, position: int, file: Path, crc: int, at_once: int) -> int:
    for start in range(0, len(view), at_once):
        block = view[start : start + at_once]
        read_whole(descriptor, block, position + start, file)
        crc = crc32(block, crc)
    return crc


class _Upload:
    """Two pinned buffers and a stream: a block is read from the disk while the previous one is sent to the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A thread begins on the first GPU; pinning there would open a context on it for every process.
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)
        # Pending writes of the model's construction to the parameters come first.
        self._stream.wait_stream(torch.cuda.default_stream(device))
        # The current stream of this thread from here on.
        torch.cuda.set_stream(self._stream)
        self._buffers = [_pinned(0)] * 2
        self._sent = [torch.cuda.Event(blocking=True) for _ in range(2)]
        self._turn = 0

    def next_buffer(self, num_bytes: int) -> tuple[Tensor, memoryview]:
        """Return a pinned buffer, uint8 [num_bytes or more], and its memory, once its content has arrived."""
        self._turn = 1 - self._turn
        self._sent[self._turn].synchronize()
        if self._buffers[self._turn][0].numel() < num_bytes:
            self._buffers[self._turn] = _pinned(num_bytes)
        return self._buffers[self._turn]

    def send_run(self, read: Tensor, into: Tensor) -> None:
        """Copy bytes to the GPU; returns before they have arrived."""
        into.copy_(read, non_blocking=True)
        self._sent[self._turn].record(self._stream)

    def send(self, matrix: Tensor, into: Tensor, block: Slice) -> None:
        """Copy the block's needed columns to the GPU in its dtype; returns before they have arrived."""
        # Cut and cast on the GPU: a copy that changes layout or dtype would wait for the CPU.
        there = matrix.to(self._device, non_blocking=True)
        into.copy_(there[:, block.first_column : block.first_column + block.num_columns])
        self._sent[self._turn].record(self._stream)

    def wait(self) -> None:
        """Wait until everything that was sent has arrived."""
        self._stream.synchronize()


def _pinned(num_bytes: int) -> tuple[Tensor, memoryview]:
    buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=num_bytes > 0)
    return buffer, buffer.numpy().data.cast("B")

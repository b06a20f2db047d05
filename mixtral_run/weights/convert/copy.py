"""Copy the weights of a conversion in one stream of reads and writes, and compute all checksums on the way.

Workers are threads: reads, writes and CRC-32 all release the interpreter's lock, so one can wait for the disk while
another computes. Each has its own descriptors (the kernel's read-ahead is per open file) and one buffer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from mixtral_run.errors import WeightsError
from mixtral_run.weights.convert.copy_plan import Job, PlacedChunk, Plan
from mixtral_run.weights.convert.journal import JobSums, Journal
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.io.disk import allocate, drop_from_cache, fits_in_memory, is_in_memory
from mixtral_run.weights.io.interrupts import Interrupts
from mixtral_run.weights.io.mmap_writer import MappedWriter
from mixtral_run.weights.io.pace import Pace, num_cores
from mixtral_run.weights.io.pread import read_whole
from mixtral_run.weights.mapping.hf_to_megatron import Piece

BLOCK_BYTES = 2**20
"""Bytes that are read and written at once. They stay in the processor's cache between the read, the checksum and the
write: with 8 MiB the kernel takes three times as long."""

FLUSH_SECONDS = 5.0
"""Interval at which writes are flushed to the disk and noted in the journal. 0.25 s would cost a third of the speed."""


_STEP_SECONDS = 0.05
"""Polling interval while the number of workers is being measured."""

PATIENCE_SECONDS = 2.0
"""Time that running jobs have to end after Ctrl-C. Jobs that take longer are dropped and repeated by the next run."""


class _Stopped(Exception):
    """Raised in a worker if another one failed, or if its job takes too long after an interrupt."""


def copy_all(
    plan: Plan,
    weights: HFWeights,
    folder: Path,
    *,
    workers: int | None,
    journal: Journal,
    advance: Callable[[int], None],
    interrupts: Interrupts,
    stopping: Callable[[], None],
) -> int:
    """Write every chunk of the plan that is not in the journal yet into the files of `folder`, which must exist.

    Afterwards all chunks are in the journal, and their bytes are on the disk. workers: None measures the best number;
    returns the number that copied at the end. advance: called with bytes copied, from several threads. Raises
    WeightsError if a file cannot be read or written, and KeyboardInterrupt after a signal, which `stopping` reports;
    by then every finished job is in the journal and on the disk.
    """
    copying = _Copying(plan, weights, folder, workers, journal, advance, interrupts)
    # The wait for the disk is one long step: in a thread of its own, so that this one hears a second Ctrl-C.
    with interrupts.held(stopping), ThreadPoolExecutor(1, "copying") as pool:
        return pool.submit(copying.run).result()


class _Copying:
    """State that the workers of one copy share."""

    def __init__(
        self,
        plan: Plan,
        weights: HFWeights,
        folder: Path,
        workers: int | None,
        journal: Journal,
        advance: Callable[[int], None],
        interrupts: Interrupts,
    ) -> None:
        self._plan = plan
        self._weights = weights
        self._folder = folder
        self._journal = journal
        self._advance = advance
        self._interrupts = interrupts
        self._stop = threading.Event()
        self._in_memory = is_in_memory(folder)
        # With at most one core for each file, no worker waits for another one to write.
        self._pace = Pace(workers, mappable=self._in_memory and num_cores() > len(plan.files))
        # If source and result fit, they stay in the page cache for the next step; else they would displace other data.
        self._drop_behind = not fits_in_memory(2 * plan.num_bytes)
        self._remaining = iter([(number, job) for number, job in enumerate(plan.jobs) if number not in journal.done])
        self._lock = threading.Lock()
        self._finished: list[tuple[int, JobSums]] = []

    def run(self) -> int:
        """Copy; return the number of workers at the end."""
        if self._in_memory:
            _lengthen(self._folder, self._plan)
        pace = self._pace
        files = [self._folder / name for name in self._plan.files]
        with _Flusher(files, self._journal, self._finished, self._lock, drop_behind=self._drop_behind) as flusher:
            with ThreadPoolExecutor(pace.num_threads, "copy") as pool:
                try:
                    futures = [pool.submit(self._work, number) for number in range(pace.num_threads)]
                    running = True
                    while running:
                        pace.step()
                        patience = FLUSH_SECONDS if pace.settled else _STEP_SECONDS
                        done, not_done = wait(futures, patience, FIRST_EXCEPTION)
                        running = bool(not_done) and not any(future.exception() for future in done)
                        if running and pace.settled and not self._interrupts.asked:
                            flusher.flush()
                finally:
                    # Leaving the pool waits for its threads; after Ctrl-C they end by themselves.
                    if not self._interrupts.asked:
                        self._stop.set()
            flusher.flush()
        errors = [error for future in futures if (error := future.exception()) is not None]
        # Ctrl-C also ends a `| tee`: whoever reported progress to it failed by that.
        expected = (_Stopped, BrokenPipeError) if self._interrupts.asked else ()
        for error in sorted(errors, key=lambda each: isinstance(each, _Stopped)):
            if not isinstance(error, expected):
                raise error
        return pace.chosen.workers

    def _work(self, me: int) -> None:
        """Run one worker, from its first job to its last."""

        def checkpoint() -> None:
            self._pace.wait_for_turn(me, lambda: self._stop.is_set() or self._interrupts.asked)
            if self._stop.is_set() or self._interrupts.seconds > PATIENCE_SECONDS:
                raise _Stopped

        with _Worker(
            self._weights, self._folder, checkpoint, self._copied, self._pace,
            reserve=not self._in_memory, drop_behind=self._drop_behind,
        ) as worker:  # fmt: skip
            while True:
                checkpoint()
                with self._lock:
                    number, job = (-1, None) if self._interrupts.asked else next(self._remaining, (-1, None))
                if job is None:
                    self._pace.let_all_go()
                    return
                sums = worker.copy(job)
                with self._lock:
                    self._finished.append((number, sums))

    def _copied(self, num_bytes: int) -> None:
        self._pace.advance(num_bytes)
        self._advance(num_bytes)


def _lengthen(folder: Path, plan: Plan) -> None:
    """Give the files their final lengths; parts that are not written yet take no memory."""
    for name, length in plan.files.items():
        try:
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(descriptor).st_size < length:
                    os.ftruncate(descriptor, length)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unwritable(folder / name, error) from error


class _Flusher:
    """Flushes written data to the disk, and notes in the journal what is there."""

    def __init__(
        self,
        files: list[Path],
        journal: Journal,
        finished: list[tuple[int, JobSums]],
        lock: threading.Lock,
        *,
        drop_behind: bool,
    ) -> None:
        self._files = files
        self._journal = journal
        self._finished = finished
        self._lock = lock
        self._drop_behind = drop_behind
        self._descriptors: list[int] = []

    def __enter__(self) -> _Flusher:
        self._descriptors = [os.open(file, os.O_RDONLY | os.O_CREAT, 0o644) for file in self._files]
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def flush(self) -> None:
        """Wait for the disk, then note the jobs that were finished before the wait."""
        with self._lock:
            finished = list(self._finished)
            self._finished.clear()
        try:
            for descriptor in self._descriptors:
                os.fdatasync(descriptor)
                if self._drop_behind:
                    drop_from_cache(descriptor)
            self._journal.add(finished)
        except OSError as error:
            raise unwritable(self._files[0].parent, error) from error


def unwritable(where: Path, error: OSError) -> WeightsError:
    """Return the error for a checkpoint that cannot be written."""
    return WeightsError(
        "The checkpoint cannot be written.",
        where=str(where),
        found=error.strerror,
        next_command="df -h, then the same command again: it continues where this one stopped",
    )


class _Worker:
    def __init__(
        self,
        weights: HFWeights,
        folder: Path,
        checkpoint: Callable[[], None],
        advance: Callable[[int], None],
        pace: Pace,
        *,
        reserve: bool,
        drop_behind: bool,
    ) -> None:
        """Open a worker. checkpoint: called before every block; waits for the worker's turn, or raises to end it.

        pace: decides how to write. reserve: allocate a chunk before it is written; on tmpfs that would admit one worker
        at a time to a file, and write every page twice.
        """
        self._weights = weights
        self._folder = folder
        self._checkpoint = checkpoint
        self._advance = advance
        self._drop_behind = drop_behind
        self._reserve = reserve
        self._pace = pace
        self._mapped = MappedWriter()
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._descriptors: dict[tuple[Path, int], int] = {}

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def copy(self, job: Job) -> JobSums:
        """Fill a job's chunks."""
        for chunk in job.chunks if self._reserve else ():
            self._allocate(chunk)
        sums = self._copy_columns(job) if job.unit.splits_columns else self._copy_runs(job)
        if self._drop_behind:
            for name in job.unit.sources:
                source = self._weights.sources[name]
                drop_from_cache(self._open(source.file, os.O_RDONLY), source.start, source.num_bytes)
        self._mapped.release()
        return sums

    def _copy_runs(self, job: Job) -> JobSums:
        sources = dict.fromkeys(job.unit.sources, 0)
        chunks = [0] * len(job.chunks)
        # One tensor that becomes one chunk has one checksum.
        same = len(sources) == 1 and len(chunks) == 1
        for piece in job.unit.pieces:
            for block, first in self._blocks(piece):
                sources[piece.source] = crc32(block, sources[piece.source])
                if not same:
                    chunks[piece.chunk] = crc32(block, chunks[piece.chunk])
                self._write(job.chunks[piece.chunk], (piece.chunk_start * self._item_size) + first, block)
        for number, chunk in enumerate(job.chunks):
            chunks[number] = self._fill_padding(chunk, job.unit.num_filled(number), chunks[number])
        if same:
            chunks = list(sources.values())
        self._close_frames(job, chunks)
        return JobSums(sources, tuple(chunks))

    def _fill_padding(self, chunk: PlacedChunk, num_filled: int, crc: int) -> int:
        """Write zeros after a chunk's first `num_filled` elements, whose CRC-32 is `crc`; return that of all."""
        end = chunk.chunk.num_elements * self._item_size
        for first in range(num_filled * self._item_size, end, BLOCK_BYTES):
            block = bytes(min(BLOCK_BYTES, end - first))
            crc = crc32(block, crc)
            self._write(chunk, first, block)
        return crc

    def _copy_columns(self, job: Job) -> JobSums:
        name = job.unit.sources[0]
        pieces = job.unit.pieces
        row_bytes = pieces[0].source_step * self._item_size
        whole = Piece(name, 0, 0, 0, sum(piece.num_elements for piece in pieces))
        source, chunks = 0, [0] * len(job.chunks)
        for block, first in self._blocks(whole, row_bytes):
            source = crc32(block, source)
            rows = np.frombuffer(block, np.uint8).reshape(-1, row_bytes)
            for piece in pieces:
                begin, width = piece.source_start * self._item_size, piece.length * self._item_size
                part = np.ascontiguousarray(rows[:, begin : begin + width]).data.cast("B")
                chunks[piece.chunk] = crc32(part, chunks[piece.chunk])
                self._write(job.chunks[piece.chunk], first // row_bytes * width, part)
        self._close_frames(job, chunks)
        return JobSums({name: source}, tuple(chunks))

    @property
    def _item_size(self) -> int:
        return self._weights.item_size

    def _blocks(self, piece: Piece, multiple: int = 1) -> Iterator[tuple[memoryview, int]]:
        """Yield the piece's bytes in blocks of a multiple of `multiple` bytes, each with its first byte's index."""
        source = self._weights.sources[piece.source]
        start, length = source.start + piece.source_start * self._item_size, piece.num_elements * self._item_size
        step = max(BLOCK_BYTES // multiple, 1) * multiple
        if step > len(self._buffer):
            self._buffer = memoryview(bytearray(step))
        for first in range(0, length, step):
            self._checkpoint()
            block = self._buffer[: min(step, length - first)]
            self._read(source.file, start + first, block)
            yield block, first
            self._advance(len(block))

    def _read(self, file: Path, position: int, block: memoryview) -> None:
        read_whole(self._open(file, os.O_RDONLY), block, position, file)

    def _allocate(self, chunk: PlacedChunk) -> None:
        file = self._folder / chunk.file
        try:
            allocate(self._open(file, os.O_RDWR | os.O_CREAT), chunk.start, chunk.frame.length)
        except OSError as error:
            raise unwritable(file, error) from error

    def _write(self, chunk: PlacedChunk, first: int, block: memoryview | bytes, *, frame: bool = False) -> None:
        """Write into a chunk's payload, or with `frame` into the item that holds it."""
        file = self._folder / chunk.file
        position = (chunk.start if frame else chunk.payload_start) + first
        done = 0
        try:
            descriptor = self._open(file, os.O_RDWR | os.O_CREAT)
            limits = chunk.start, chunk.start + chunk.frame.length
            if self._pace.now.mapped and not frame and self._mapped.write(descriptor, limits, position, block):
                return
            while done < len(block):
                done += os.pwrite(descriptor, block[done:], position + done)
        except OSError as error:
            raise unwritable(file, error) from error

    def _close_frames(self, job: Job, checksums: list[int]) -> None:
        for chunk, checksum in zip(job.chunks, checksums, strict=True):
            self._write(chunk, 0, chunk.frame.head(checksum), frame=True)
            after = chunk.frame.payload_start + chunk.frame.num_bytes
            self._write(chunk, after, chunk.frame.tail(checksum), frame=True)

    def _open(self, file: Path, flags: int) -> int:
        if (file, flags) not in self._descriptors:
            self._descriptors[file, flags] = os.open(file, flags, 0o644)
        return self._descriptors[file, flags]

"""Journal of the jobs of a conversion that are on the disk, so that an interrupted conversion continues with the rest.

Each job has a line, which is written after the job's bytes: however the process or the machine ends, the jobs in the
journal are on the disk. The first line identifies the conversion; a different one starts anew. Every line has its own
checksum, and what a line says about the files is compared with them (`stale_jobs`) before the copy continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from isal.isal_zlib import crc32

from mixtral_run import __version__
from mixtral_run.weights.convert.copy_plan import Job, PlacedChunk, Plan
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.io.disk import allocate
from mixtral_run.weights.io.files import sync_path

JOURNAL_NAME = "journal.jsonl"
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class JobSums:
    """CRC-32 of the HF tensors that a job read, by name, and of the chunks that it wrote, in order."""

    sources: dict[str, int]
    chunks: tuple[int, ...]


def identity(weights: HFWeights, plan: Plan) -> str:
    """Return a hash that identifies a conversion: source files, architecture, layout and the kit's version."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    content = {"kit_version": __version__, "files": files, "result": plan.files, "num_jobs": len(plan.jobs)}
    # The number of heads decides the places of the rows of q, k and v, and no file's size shows it.
    content["architecture"] = weights.architecture.to_mapping()
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Journal:
    """The journal of one conversion in its work folder.

    done: the jobs that need not be repeated. damage: why an earlier journal cannot be used; None if it can, or if there
    is none.
    """

    def __init__(self, folder: Path, wanted: str, jobs: Sequence[Job]) -> None:
        self.path = folder / JOURNAL_NAME
        self.done: dict[int, JobSums] = {}
        whole, self.damage = _whole_lines(self.path)
        self.is_new = self.damage is not None or not whole or whole[0] != {"identity": wanted}
        for number, line in enumerate([] if self.is_new else whole[1:], 2):
            sums = _sums_of(line, jobs)
            if sums is None:
                self.damage, self.is_new, self.done = f"line {number} names no job of this conversion", True, {}
                break
            self.done[line["job"]] = sums
        self._identity = wanted

    def start(self, jobs: Sequence[Job]) -> None:
        """Rewrite the journal from the complete lines, since nothing may be appended to a line that was cut off.

        Space for the lines of all jobs is reserved, so that finished jobs can be noted even once the disk is full.
        """
        lines = [{"identity": self._identity}, *(_line(number, sums) for number, sums in self.done.items())]
        # Next to the old one, which stays until this one is complete.
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w", encoding="utf-8") as stream:
            allocate(stream.fileno(), 0, _most_bytes(lines[0], jobs), keep_size=True)
            _write(stream, lines)
        partial.rename(self.path)
        sync_path(self.path.parent)

    def add(self, finished: Iterable[tuple[int, JobSums]]) -> None:
        """Add jobs whose bytes are on the disk; the lines are on the disk when this returns."""
        pairs = list(finished)
        if pairs:
            with self.path.open("a", encoding="utf-8") as stream:
                _write(stream, [_line(number, sums) for number, sums in pairs])
        self.done |= dict(pairs)


def _write(stream: TextIO, lines: Iterable[dict[str, Any]]) -> None:
    stream.write("".join(_text(line) for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def _most_bytes(head: dict[str, Any], jobs: Sequence[Job]) -> int:
    """Return the largest size that the journal of all jobs can reach."""
    crc = 2**32 - 1
    lines = [head]
    for number, job in enumerate(jobs):
        lines.append(_line(number, JobSums(dict.fromkeys(job.unit.sources, crc), (crc,) * len(job.chunks))))
    return sum(len(_text(line)) for line in lines)


def _line(number: int, sums: JobSums) -> dict[str, Any]:
    return {"job": number, "sources": sums.sources, "chunks": list(sums.chunks)}


def _text(line: dict[str, Any]) -> str:
    """Return a line with its checksum, which is that of the line without it."""
    text = json.dumps(line)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _sums_of(line: dict[str, Any], jobs: Sequence[Job]) -> JobSums | None:
    """Return the sums of a job's line; None if the line is of another form, or of no job of this conversion."""
    number, sources, chunks = line.get("job"), line.get("sources"), line.get("chunks")
    if type(number) is not int or not 0 <= number < len(jobs):
        return None
    if not isinstance(sources, dict) or set(sources) != set(jobs[number].unit.sources):
        return None
    if not isinstance(chunks, list) or len(chunks) != len(jobs[number].chunks):
        return None
    if not all(type(crc) is int for crc in (*sources.values(), *chunks)):
        return None
    return JobSums(sources, tuple(chunks))


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the lines of a journal, and why it is damaged, if it is."""
    if not path.is_file():
        return [], None
    found: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, text in enumerate(texts, 1):
        line = _line_of(text)
        if line is None and number < len(texts):
            return [], f"line {number} is not what was written"
        # The last line was being written when the process ended: it may hold anything.
        found += [line] if line is not None else []
    return found, None


def _line_of(text: str) -> dict[str, Any] | None:
    """Return the content of a line; None if it is not what was written."""
    crc, _, content = text.partition(" ")
    if not content.endswith("\n") or crc != f"{zlib.crc32(content[:-1].encode()):08x}":
        return None
    try:
        line = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def stale_jobs(plan: Plan, folder: Path, done: Mapping[int, JobSums], advance: Callable[[int], None]) -> list[int]:
    """Return the jobs whose bytes in `folder` are not those that the journal has checksums of. advance: bytes read."""

    def check(number: int) -> int | None:
        whole = all(
            _is_written(folder / placed.file, placed, crc, advance)
            for placed, crc in zip(plan.jobs[number].chunks, done[number].chunks, strict=True)
        )
        return None if whole else number

    with ThreadPoolExecutor(2, "journal") as pool:
        return [number for number in pool.map(check, done) if number is not None]


def _is_written(file: Path, placed: PlacedChunk, crc: int, advance: Callable[[int], None]) -> bool:
    """Return True if a chunk and its frame are in the file, with this CRC-32 of the chunk."""
    head, tail, size = placed.frame.head(crc), placed.frame.tail(crc), placed.frame.num_bytes
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if os.pread(descriptor, len(head), placed.start) != head:
            return False
        found = 0
        for first in range(0, size, _BLOCK_BYTES):
            block = os.pread(descriptor, min(_BLOCK_BYTES, size - first), placed.payload_start + first)
            found = crc32(block, found)
            advance(len(block))
        return found == crc and os.pread(descriptor, len(tail), placed.payload_start + size) == tail
    finally:
        os.close(descriptor)

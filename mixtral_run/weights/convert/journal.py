"""Journal of the jobs of a conversion that are on the disk, so that an interrupted conversion continues with the rest.

Each job has a line, which is written after the job's bytes: however the process or the machine ends, the jobs in the
journal are on the disk. The first line identifies the conversion; a different one starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mixtral_run import __version__
from mixtral_run.weights.convert.copy_plan import Job, Plan
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.io.disk import allocate
from mixtral_run.weights.io.files import sync_path

JOURNAL_NAME = "journal.jsonl"


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
    """The journal of one conversion in its work folder. done: the jobs that need not be repeated."""

    def __init__(self, folder: Path, wanted: str) -> None:
        self.path = folder / JOURNAL_NAME
        self.done: dict[int, JobSums] = {}
        whole = _whole_lines(self.path)
        self.is_new = not whole or whole[0] != {"identity": wanted}
        for line in [] if self.is_new else whole[1:]:
            self.done[line["job"]] = JobSums(line["sources"], tuple(line["chunks"]))
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
    stream.write("".join(json.dumps(line) + "\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def _most_bytes(head: dict[str, Any], jobs: Sequence[Job]) -> int:
    """Return the largest size that the journal of all jobs can reach."""
    crc = 2**32 - 1
    lines = [head]
    for number, job in enumerate(jobs):
        lines.append(_line(number, JobSums(dict.fromkeys(job.unit.sources, crc), (crc,) * len(job.chunks))))
    return sum(len(json.dumps(line)) + 1 for line in lines)


def _line(number: int, sums: JobSums) -> dict[str, Any]:
    return {"job": number, "sources": sums.sources, "chunks": list(sums.chunks)}


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    # A line that was being written when the machine lost power may hold anything.
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith("\n") else None
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or (lines and not _is_job(line)):
            break
        lines.append(line)
    return lines


def _is_job(line: dict[str, Any]) -> bool:
    """Return True if a value of the journal has the form of a job's line."""
    if line.keys() != {"job", "sources", "chunks"}:
        return False
    number, sources, chunks = line["job"], line["sources"], line["chunks"]
    sums = [*sources.values(), *chunks] if isinstance(sources, dict) and isinstance(chunks, list) else [None]
    return type(number) is int and number >= 0 and all(type(crc) is int and 0 <= crc < 2**32 for crc in sums)

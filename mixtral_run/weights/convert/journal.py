"""Which jobs of a conversion are on the disk, so that a conversion that was cut off goes on with the rest.

A line a job, written after the job's bytes are: whatever ends the process or the machine, what the journal names is
there. Its first line says which conversion it is; another one starts anew.
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
from mixtral_run.weights.hf.safetensors_files import HFWeights
from mixtral_run.weights.io.disk import allocate
from mixtral_run.weights.io.files import sync_path

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class JobSums:
    """CRC-32 of what a job read, by HF tensor, and of the chunks it wrote, in their order."""

    sources: dict[str, int]
    chunks: tuple[int, ...]


def identity(weights: HFWeights, plan: Plan) -> str:
    """Tells conversions apart: the source's files as they are now, what they are, the layout, and the kit."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    content = {"kit_version": __version__, "files": files, "result": plan.files, "num_jobs": len(plan.jobs)}
    # The number of heads alone decides where the rows of q, k and v go, and leaves every size as it is.
    content["architecture"] = weights.architecture.to_mapping()
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Journal:
    """The journal of the conversion `identity` in `folder`; `done` holds the jobs that need not be done again."""

    def __init__(self, folder: Path, wanted: str) -> None:
        self.path = folder / JOURNAL_NAME
        self.done: dict[int, JobSums] = {}
        whole = _whole_lines(self.path)
        self.is_new = not whole or whole[0] != {"identity": wanted}
        for line in [] if self.is_new else whole[1:]:
            sources = {name: int(crc) for name, crc in line["sources"].items()}
            self.done[int(line["job"])] = JobSums(sources, tuple(line["chunks"]))
        self._identity = wanted

    def start(self, jobs: Sequence[Job]) -> None:
        """Write what is known so far: a line that was cut off must not be added to.

        Room for all the jobs' lines is reserved: what is whole can be noted when the disk has become full.
        """
        lines = [{"identity": self._identity}, *(_line(number, sums) for number, sums in self.done.items())]
        # Beside the old one, which stays until this is whole.
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w", encoding="utf-8") as stream:
            allocate(stream.fileno(), 0, _most_bytes(lines[0], jobs), keep_size=True)
            _write(stream, lines)
        partial.rename(self.path)
        sync_path(self.path.parent)

    def add(self, finished: Iterable[tuple[int, JobSums]]) -> None:
        """Note jobs whose bytes are on the disk; on the disk itself when this returns."""
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
    """How long the journal of all jobs can become."""
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
    lines = []
    # A line that was being written when the machine lost power may hold anything.
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith("\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines

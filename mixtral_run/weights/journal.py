"""Which jobs of a conversion are on the disk, so that a conversion that was cut off goes on with the rest.

A line a job, written after the job's bytes are: whatever ends the process or the machine, what the journal names is
there. Its first line says which conversion it is; another one starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run import __version__
from mixtral_run.weights.plan import Plan
from mixtral_run.weights.shards import HFWeights

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class JobSums:
    """CRC-32 of what a job read, by HF tensor, and of the chunks it wrote, in their order."""

    sources: dict[str, int]
    chunks: tuple[int, ...]


def identity(weights: HFWeights, plan: Plan) -> str:
    """Tells conversions apart: the source's files as they are now, the layout, and the kit that lays it out."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    content = {"kit_version": __version__, "files": files, "result": plan.files, "num_jobs": len(plan.jobs)}
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

    def start(self) -> None:
        """Write what is known so far: a line that was cut off must not be added to."""
        lines: list[dict[str, Any]] = [{"identity": self._identity}]
        lines += [_line(number, sums) for number, sums in self.done.items()]
        self._write(lines, "w")

    def add(self, finished: Iterable[tuple[int, JobSums]]) -> None:
        """Note jobs whose bytes are on the disk; on the disk itself when this returns."""
        pairs = list(finished)
        self.done |= dict(pairs)
        if pairs:
            self._write([_line(number, sums) for number, sums in pairs], "a")

    def _write(self, lines: list[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())


def _line(number: int, sums: JobSums) -> dict[str, Any]:
    return {"job": number, "sources": sums.sources, "chunks": list(sums.chunks)}


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith("\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines

"""Journal of the files of a merge that are on the disk, so that an interrupted merge continues with the others."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from mixtral_run import __version__
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.io.crc import crc_of
from mixtral_run.weights.manifest.manifest import MANIFEST_NAME

MERGE_JOURNAL = "merge.jsonl"


def identity(weights: HFWeights, adapters: Sequence[tuple[float, Path]]) -> str:
    """Return a hash that identifies a merge: source files, weights and manifests of the adapters, the kit's version.

    adapters: the weight and the iteration's folder of each.
    """
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    manifests = [(weight, (folder / MANIFEST_NAME).read_text(encoding="utf-8")) for weight, folder in adapters]
    return hashlib.sha256(json.dumps([__version__, files, manifests]).encode()).hexdigest()


class MergeJournal:
    """The journal of one merge in its work folder; is_new: there is nothing to continue."""

    def __init__(self, folder: Path, wanted: str) -> None:
        self._path, self._folder = folder / MERGE_JOURNAL, folder
        lines = _lines(self._path)
        self.is_new = not lines or lines[0] != {"identity": wanted}
        self._done = {} if self.is_new else {str(line.get("file")): line for line in lines[1:]}
        self._identity = wanted

    @property
    def has_files(self) -> bool:
        """Return True if a file is complete."""
        return bool(self._done)

    def start(self) -> None:
        """Write the first line if the journal is new."""
        if self.is_new:
            self._append({"identity": self._identity})

    def finished(self, name: str, sources: list[str]) -> dict[str, int] | None:
        """Return the CRC-32 of a file's source tensors if it is complete, and on the disk as it was written."""
        line = self._done.get(name, {})
        sums = line.get("sources")
        if not isinstance(sums, dict) or set(sums) != set(sources) or not (self._folder / name).is_file():
            return None
        return sums if crc_of(self._folder / name) == line.get("crc32") else None

    def add(self, name: str, sums: dict[str, int]) -> None:
        """Note a file whose bytes are on the disk; the note is on the disk when this returns."""
        line = {"file": name, "crc32": crc_of(self._folder / name), "sources": sums}
        self._append(line)
        self._done[name] = line

    def _append(self, line: dict[str, object]) -> None:
        text = json.dumps(line)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
            stream.flush()
            os.fsync(stream.fileno())


def _lines(path: Path) -> list[dict[str, object]]:
    """Return the lines up to the first one that is not what was written."""
    found: list[dict[str, object]] = []
    if not path.is_file():
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        crc, _, content = text.partition(" ")
        if not content.endswith("\n") or crc != f"{zlib.crc32(content[:-1].encode()):08x}":
            break
        found.append(json.loads(content))
    return found

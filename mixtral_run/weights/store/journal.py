"""The journal of copies: the files that are complete, with sizes, checksums and the store's tags, on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mixtral_run.weights.io.crc import crc_of
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.store.folder import StoredObject, StoreFolder
from mixtral_run.weights.store.marker import FileRecord
from mixtral_run.weights.store.transfer import Gate, send, side_by_side


@dataclass(frozen=True)
class Copied:
    """A file that is on both sides."""

    record: FileRecord
    tag: str

    def is_in(self, objects: Mapping[str, StoredObject], name: str) -> bool:
        """Return True if the store still lists what was copied."""
        found = objects.get(name)
        return found is not None and found.size == self.record.size and found.tag == self.tag


@dataclass
class Journal:
    """Copied files by their names in the store. Several threads may call `note`."""

    file: Path
    entries: dict[str, Copied] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, file: Path) -> Journal:
        """Read a journal; a missing or damaged one is empty, so that everything is copied again."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            entries = {
                name: Copied(FileRecord(int(size), str(crc)), str(tag)) for name, (size, crc, tag) in values.items()
            }
            return cls(file, entries)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return cls(file)

    def note(self, name: str, copied: Copied) -> None:
        """Record a file, on the disk as well."""
        with self._lock:
            self.entries[name] = copied
            self._write()

    def forget(self, names: set[str]) -> None:
        """Remove files from the journal."""
        with self._lock:
            self.entries = {name: each for name, each in self.entries.items() if name not in names}
            self._write()

    def _write(self) -> None:
        values = {name: [each.record.size, each.record.crc32, each.tag] for name, each in self.entries.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(values))


def send_missing(
    store: StoreFolder, files: Mapping[str, Path], journal: Journal, gate: Gate
) -> tuple[dict[str, FileRecord], int]:
    """Copy files to a store, except those that it has: same size, checksum and tag as in the journal.

    Returns the records of all files by their names in the store, and the bytes that were sent.
    """
    objects = store.objects()
    sent: list[int] = []

    def one(item: tuple[str, Path]) -> tuple[str, FileRecord]:
        name, file = item
        known = journal.entries.get(name)
        if known is not None and known.is_in(objects, name) and known.record == record_of(file):
            return name, known.record
        record, found = send(store, name, file, gate)
        journal.note(name, Copied(record, found.tag))
        sent.append(record.size)
        return name, record

    return dict(side_by_side(one, sorted(files.items()))), sum(sent)


def record_of(file: Path) -> FileRecord | None:
    """Return size and checksum of a file of this machine; None if it cannot be read."""
    try:
        return FileRecord(file.stat().st_size, f"{crc_of(file):08x}")
    except OSError:
        return None

"""SHA-256 of data files, found again quickly: a large file that has not changed since is not read a second time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from mixtral_run.errors import ConfigError

HASHED_ALWAYS = 16 * 2**20
"""Files of up to so many bytes are read each time."""
BLOCK_BYTES = 8 * 2**20
SPOTS, SPOT_BYTES = 64, 2**16
SETTLED_SECONDS = 2.0
"""A file that changed less than so long ago could change again without another time stamp."""
INDEX_NAME = ".files.json"
MOST_FILES = 1000


def file_sha256(path: Path, folder: Path | None) -> str:
    """Return the SHA-256 of a file in hex.

    For a large file the hash is kept in FOLDER/.files.json, with size, inode and times of the file and a hash of 64
    spots spread over its content. If all of them are as before, the kept hash is returned.

    Raises ConfigError if the file changes while it is read, OSError if it cannot be read.
    """
    before = _state(path)
    if before[0] <= HASHED_ALWAYS or folder is None:
        return _whole(path, before)
    name, index = str(path.resolve()), _read_index(folder)
    kept = index.get(name)
    spots = _spots(path, before[0])
    if isinstance(kept, dict) and kept.get("state") == before and kept.get("spots") == spots:
        return str(kept.get("sha256"))
    found = _whole(path, before)
    if time.time() - max(before[1:3]) / 1e9 > SETTLED_SECONDS:
        index.pop(name, None)
        index[name] = {"state": before, "spots": spots, "sha256": found}
        _write_index(folder, dict(list(index.items())[-MOST_FILES:]))
    return found


def refuse_changed(path: Path, sha256: str) -> None:
    """Raise ConfigError if a file's content is no longer the one with this hash."""
    try:
        is_same = _whole(path, _state(path)) == sha256
    except OSError as error:
        raise ConfigError(
            "A data file cannot be read any more.", where=str(path), found=error.strerror or str(error)
        ) from error
    if not is_same:
        raise _changing(path)


def _state(path: Path) -> list[int]:
    """Return what changes when a file is written: size, times of content and inode in ns, inode, device."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _whole(path: Path, before: list[int]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    if _state(path) != before:
        raise _changing(path)
    return digest.hexdigest()


def _changing(path: Path) -> ConfigError:
    return ConfigError(
        "A data file changed while it was read.",
        where=str(path),
        expected="a file that is complete before the run starts",
        next_command="the same command, once the file is written",
    )


def _spots(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for number in range(SPOTS):
            digest.update(os.pread(file.fileno(), SPOT_BYTES, number * (size - SPOT_BYTES) // (SPOTS - 1)))
    return digest.hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return index if isinstance(index, dict) else {}


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    """Replace the index. What another process adds at the same moment is lost, and found again by reading the file.

    Where it cannot be written, as in a cache that this user may only read, the file is read at the next start again.
    """
    partial = folder / f"{INDEX_NAME}.{os.getpid()}.partial"
    try:
        partial.write_text(json.dumps(index), encoding="utf-8")
        partial.rename(folder / INDEX_NAME)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)

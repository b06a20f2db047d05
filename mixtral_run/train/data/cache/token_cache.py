"""One token cache: a folder of flat arrays, and cache.json that describes them. docs/formats.md has the format."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32

from mixtral_run import __version__
from mixtral_run.errors import WeightsError
from mixtral_run.train.data.cache.token_arrays import DTYPES, EncodedChunk, TokenArrays
from mixtral_run.weights.io.files import sync_folder_and_files, write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
"""Version of the format. A cache of another version is not found, because the version is a part of the key."""
DESCRIPTION = "cache.json"
CHECKED_BYTES = 8 * 2**30
"""Arrays of up to so many bytes are compared with their checksums at each start; of larger ones the size is."""
BLOCK_BYTES = 8 * 2**20


class DamagedCacheError(WeightsError):
    """A cache that cannot be used. `found` says why."""


@dataclass(frozen=True, eq=False)
class TokenCache:
    """An open cache. It cannot be removed to make space while this object lives.

    Attributes:
        folder: of the cache.
        arrays: its content, memory-mapped.
        notes: what the reading of the data reported, such as unused keys.
        identity: a hash of the content, equal on every machine.
        num_bytes: on the disk.
    """

    folder: Path
    arrays: TokenArrays
    notes: Mapping[str, Any]
    identity: str
    num_bytes: int
    in_use: FileIO | None = None


class CacheWriter:
    """Writes the arrays of a cache as examples arrive; little of them is in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in DTYPES}
        self._counts = dict.fromkeys(DTYPES, 0)
        self._sums = dict.fromkeys(DTYPES, 0)
        self._ends = {"offsets": 0, "span_offsets": 0, "place_offsets": 0}
        self._highest_id = 0
        for name in self._ends:
            self._write(name, np.zeros(1, DTYPES[name]))

    def add(self, chunk: EncodedChunk, digests: NDArray[np.uint64], places: Sequence[str]) -> None:
        """Append examples. digests: a hash of each one's content. places: where each stands in its file."""
        text = [place.encode("utf-8", "replace") for place in places]
        self._write("tokens", chunk.tokens)
        self._write("spans", chunk.spans)
        self._write("digests", digests)
        self._write("places", np.frombuffer(b"".join(text), np.uint8))
        self._write_ends("offsets", chunk.lengths)
        self._write_ends("span_offsets", chunk.num_spans)
        self._write_ends("place_offsets", np.asarray([len(each) for each in text], np.int64))
        self._highest_id = max(self._highest_id, int(chunk.tokens.max(initial=0)))

    def finish(self, key: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Write cache.json last. Everything is on the disk when this returns."""
        self.close()
        arrays = {name: {"count": self._counts[name], "crc32": self._sums[name]} for name in DTYPES}
        content: dict[str, Any] = {
            "format": FORMAT, "kit_version": __version__, "key": dict(key), "arrays": arrays,
            "highest_id": self._highest_id, "notes": dict(notes),
        }  # fmt: skip
        content["crc32"] = _sum_of(content)
        write_atomically(self._folder / DESCRIPTION, json.dumps(content, indent=2) + "\n")
        sync_folder_and_files(self._folder)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _write_ends(self, name: str, lengths: NDArray[np.int64]) -> None:
        if len(lengths):
            ends = self._ends[name] + np.cumsum(lengths)
            self._ends[name] = int(ends[-1])
            self._write(name, ends)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, DTYPES[name]).tobytes()
        self._files[name].write(data)
        self._counts[name] += len(values)
        self._sums[name] = crc32(data, self._sums[name])


def open_cache(folder: Path, *, verify: bool) -> TokenCache:
    """Open a cache.

    Args:
        folder: of the cache.
        verify: compare the content with its checksums. The sizes are compared always.

    Raises:
        DamagedCacheError: a file is missing, has another size or another content than when it was written.
    """
    if not (folder / DESCRIPTION).is_file():  # to open a pipe would wait for its writer
        raise DamagedCacheError("A token cache is damaged.", where=str(folder), found=f"{DESCRIPTION} is no file")
    in_use = _mark_in_use(folder / DESCRIPTION)
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        counts = {name: int(described["arrays"][name]["count"]) for name in DTYPES}
        sums = {name: int(described["arrays"][name]["crc32"]) for name in DTYPES}
        highest_id, notes = int(described["highest_id"]), dict(described["notes"])
        if described.pop("crc32") != _sum_of(described):
            raise ValueError(f"{DESCRIPTION}: its content has changed")
        _check_sizes(folder, counts)
        if verify:
            _check_sums(folder, sums)
        mapped = {name: _map(folder / f"{name}.bin") for name in DTYPES}
        arrays = {name: np.frombuffer(mapped[name] or b"", DTYPES[name]) for name in DTYPES}
        _check_offsets(arrays)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCacheError("A token cache is damaged.", where=str(folder), found=_reason(error)) from error
    tokens = mapped["tokens"]
    if tokens is not None:
        # Rows are read in random order; reading ahead would only displace other pages.
        tokens.madvise(mmap.MADV_RANDOM)
    content = TokenArrays(**arrays | {"spans": arrays["spans"].reshape(-1, 2)}, highest_id=highest_id, mapped=tokens)
    identity = f"{folder.name}-{crc32(json.dumps([counts, sums]).encode()):08x}"
    return TokenCache(folder, content, notes, identity, folder_bytes(folder), in_use)


def _reason(error: Exception) -> str:
    """Return why a cache cannot be read. Of a file only the name: a path could fill the whole line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{Path(error.filename).name}: {error.strerror}"
    return (str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}")[:200]


def _sum_of(description: Mapping[str, Any]) -> int:
    """Return the CRC-32 of a description's content."""
    return int(crc32(json.dumps(description, sort_keys=True).encode()))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder; 0 for one that is being removed."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total


def _mark_in_use(description: Path) -> FileIO | None:
    """Lock the description for reading for as long as the returned file is open, and note the time of the use."""
    with contextlib.suppress(OSError):
        os.utime(description)
    try:
        file = FileIO(description)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        # Without a lock the cache is used all the same: on file systems that have none, and while another process
        # looks whether it may be removed.
        return None
    return file


def _check_sizes(folder: Path, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        expected, found = count * DTYPES[name].itemsize, (folder / f"{name}.bin").stat().st_size
        if found != expected:
            raise ValueError(f"{name}.bin: expected {expected:,} bytes; found {found:,}")


def _check_sums(folder: Path, sums: Mapping[str, int]) -> None:
    def check(name: str) -> None:
        path = folder / f"{name}.bin"
        if path.stat().st_size > CHECKED_BYTES:
            return
        found = 0
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                found = crc32(block, found)
        if found != sums[name]:
            raise ValueError(f"{name}.bin: expected CRC-32 {sums[name]:08x}; found {found:08x}")

    with ThreadPoolExecutor(2, "checksum") as pool:
        list(pool.map(check, sums))


def _check_offsets(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError unless every offset array has one entry more than there are examples and ends where it must."""
    examples = len(arrays["digests"])
    ends = {"offsets": len(arrays["tokens"]), "span_offsets": len(arrays["spans"]) // 2}
    for name, end in (ends | {"place_offsets": len(arrays["places"])}).items():
        if len(arrays[name]) != examples + 1 or arrays[name][0] != 0 or arrays[name][-1] != end:
            raise ValueError(f"{name}.bin: does not describe {examples:,} examples")


def _map(path: Path) -> mmap.mmap | None:
    """Map a file; None for an empty one, which cannot be mapped."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None


Make = Callable[[CacheWriter, Callable[[str], None]], Mapping[str, Any]]
"""Adds all examples to a writer and returns the notes of their reading; reports now and then how far it is."""

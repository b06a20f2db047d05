"""List of the files that a host is about to send for `fetch`. The host is not trusted: every name is checked here.

The list is read before anything is written. What arrives afterwards is compared with it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from mixtral_run.fleet.jobs.transfer.links import Links, RefusedError
from mixtral_run.fleet.jobs.transfer.unpack import MAX_MEMBERS, Received, set_time, size_text
from mixtral_run.fleet.untrusted import folded, local_path, one_line

MAX_LIST_BYTES = 64 << 20
SCRIPT = (
    # Prints nothing if there is no rsync.
    "rsync --version >/dev/null 2>&1 || exit 0; printf 'rsync\\0'; "
    'cd "$1" && exec find "./$2" -printf \'%y\\0%s\\0%m\\0%T@\\0%p\\0%l\\0\''
)
FIELDS = 6
"""Kind, size, mode, modification time, path, and target of a link."""


@dataclass(frozen=True)
class File:
    """A file of a listing. mode: the permission bits as the host has them. modified: seconds since 1970."""

    num_bytes: int
    mode: int
    modified: float


@dataclass
class Listing:
    """What is below the file or folder `name` of a host. All paths begin with `name`."""

    name: str
    files: dict[PurePosixPath, File] = field(default_factory=dict)
    folders: dict[PurePosixPath, float] = field(default_factory=dict)
    links: Links = field(init=False)

    def __post_init__(self) -> None:
        self.links = Links(self.name)

    @property
    def amount(self) -> Received:
        """Return the number of files and of bytes."""
        return Received(len(self.files), sum(file.num_bytes for file in self.files.values()))

    def received(self, folder: Path) -> tuple[int, PurePosixPath | None]:
        """Return the bytes of these files that are in `folder`, and a file that is larger there than listed."""
        found, larger = 0, None
        for path, file in self.files.items():
            try:
                status = (folder / path).lstat()
            except OSError:
                continue
            found += min(status.st_size, file.num_bytes)
            if status.st_size > file.num_bytes:
                larger = path
        return found, larger

    def remove_others(self, folder: Path) -> None:
        """Remove from `folder` whatever cannot be part of this listing: it is left from an earlier state."""
        for path, status in _below(folder):
            file = self.files.get(path)
            if stat.S_ISDIR(status.st_mode):
                if path not in self.folders:
                    (folder / path).rmdir()
            elif not stat.S_ISREG(status.st_mode) or file is None or status.st_size > file.num_bytes:
                (folder / path).unlink()

    def check_arrived(self, folder: Path) -> None:
        """Raise RefusedError unless `folder` holds these files and folders and nothing else."""
        left = dict(self.files)
        for path, status in _below(folder):
            file = left.pop(path, None)
            if stat.S_ISDIR(status.st_mode) and path in self.folders:
                continue
            if file is None or not stat.S_ISREG(status.st_mode):
                raise RefusedError(f"{one_line(str(path), 80)!r} arrived and was not in the list of files")
            if status.st_size != file.num_bytes:
                raise RefusedError(
                    f"{one_line(str(path), 80)!r} has {status.st_size:,} bytes, and {file.num_bytes:,} in the list of "
                    "files: it changed while it was fetched"
                )
        for path in left:
            raise RefusedError(f"{one_line(str(path), 80)!r} is in the list of files and did not arrive")

    def complete(self, folder: Path) -> None:
        """Create the links and set modes and times, after `check_arrived`."""
        for path, file in self.files.items():
            # No setuid, setgid or sticky bit, nothing that others may write; the owner can read and write.
            (folder / path).chmod(file.mode & 0o755 | 0o600)
        self.links.create(lambda path: folder / path)
        for path in sorted(self.folders, reverse=True):
            set_time(folder / path, self.folders[path])


def _below(folder: Path) -> list[tuple[PurePosixPath, os.stat_result]]:
    """Return everything below a folder, contents before their folder; links are not followed."""
    found = []
    for place, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            path = Path(place, name)
            found.append((PurePosixPath(path.relative_to(folder)), path.lstat()))
    return found


def read_listing(stream: IO[bytes], name: str) -> Listing | None:
    """Read what SCRIPT prints and return the listing; None if the host has no rsync.

    Raises:
        RefusedError: the list is damaged or too long; or a path is absolute, leaves the folder, occurs twice, is
            neither a file, a folder nor a link, or is a link to the outside.
    """
    data = stream.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        raise RefusedError(f"the list of files is longer than {size_text(MAX_LIST_BYTES)}")
    if not data:
        return None
    mark, *words = (os.fsdecode(word) for word in data.split(b"\0"))
    if mark != "rsync" or not words or words.pop() or len(words) % FIELDS:
        raise RefusedError("the list of files is damaged")
    if len(words) > MAX_MEMBERS * FIELDS:
        raise RefusedError(f"the list has more than {MAX_MEMBERS:,} files and folders")
    listing, seen = Listing(name), set[PurePosixPath]()
    for at in range(0, len(words), FIELDS):
        path = _add(listing, words[at : at + FIELDS])
        if (key := folded(path)) in seen:
            raise RefusedError(f"{one_line(str(path), 80)!r} occurs twice")
        seen.add(key)
    if not seen:
        raise RefusedError(f"the list does not hold {one_line(name)!r}")
    _check_parents(listing)
    return listing


def _add(listing: Listing, words: list[str]) -> PurePosixPath:
    kind, size, mode, modified, place, target = words
    path = local_path(place)
    if path.parts[0] != listing.name:
        raise RefusedError(f"the list holds {one_line(str(path), 80)!r}, expected only {one_line(listing.name)!r}")
    try:
        file = File(int(size), int(mode, 8) & 0o7777, float(modified))
    except ValueError as error:
        raise RefusedError(f"the list of files is damaged: {one_line(str(error), 80)}") from error
    if file.num_bytes < 0:
        raise RefusedError(f"{one_line(str(path), 80)!r} has {file.num_bytes:,} bytes")
    if kind == "f":
        listing.files[path] = file
    elif kind == "d":
        listing.folders[path] = file.modified
    elif kind == "l":
        listing.links.add(path, target)
    else:
        raise RefusedError(f"{one_line(str(path), 80)!r} is neither a file, a folder nor a link")
    return path


def _check_parents(listing: Listing) -> None:
    for path in (*listing.files, *listing.folders, *listing.links.targets):
        if len(path.parts) > 1 and path.parent not in listing.folders:
            raise RefusedError(f"{one_line(str(path), 80)!r} is inside of something that is not a folder")
    listing.links.check()

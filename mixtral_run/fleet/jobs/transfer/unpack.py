"""Unpacking of the tar stream that a host sends for `fetch`. The host is not trusted.

Every member is checked before anything of it is written, whatever the `tarfile` of this Python checks by itself
(CVE-2007-4559, CVE-2025-4517). Symbolic links are created after all files: while files are written, the folder holds no
link that a path could lead through.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from mixtral_run.fleet.jobs.transfer.links import Links, RefusedError
from mixtral_run.fleet.untrusted import local_path, one_line

MAX_MEMBERS = 200_000
MAX_HEADER_BYTES = 1 << 20
"""The longest header of one member, its extended headers included. Python reads a header into memory as a whole."""
MAX_ALL_HEADER_BYTES = 512 << 20
"""The headers of all members together. GNU tar sends 1.5 KiB for a member whose name is longer than 100 bytes."""
MAX_GLOBAL_HEADERS = 100
"""The keys of all global headers. tarfile copies them for every member."""
BLOCK_BYTES = 1 << 20
TAIL_BYTES = 2 * tarfile.RECORDSIZE
"""tarfile reads a stream in records. Its last header is in the last record, or begins in the one before."""
GIB = 2**30


@dataclass
class Received:
    """Amount of data that was unpacked."""

    num_files: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.num_files:,} file{'s' if self.num_files != 1 else ''}, {size_text(self.num_bytes)}"


def size_text(num_bytes: int) -> str:
    """Return a size in the unit that suits it: `700 bytes`, `1.5 MiB`, `93.0 GiB`."""
    if num_bytes < 1024**2:
        return f"{num_bytes:,} byte{'s' if num_bytes != 1 else ''}"
    return f"{num_bytes / 1024**2:.1f} MiB" if num_bytes < GIB else f"{num_bytes / GIB:.1f} GiB"


def free_bytes(folder: Path) -> int:
    """Return the bytes that may be written below `folder`: the free disk space, less a reserve of 10 % or 1 GiB."""
    free = shutil.disk_usage(folder).free
    return free - min(GIB, free // 10)


def unpack(
    stream: IO[bytes],
    folder: Path,
    name: str,
    *,
    limit_bytes: int,
    on_progress: Callable[[Received], None] = lambda received: None,  # noqa: ARG005
) -> Received:
    """Unpack the file or folder `name` from a tar stream into `folder`, which must be new and empty.

    Args:
        stream: uncompressed tar, read once from its start to its end.
        name: the only entry that may appear at the top of the archive.
        limit_bytes: most bytes of file content; a larger archive is refused before more is written.
        on_progress: called after every block of content.

    Raises:
        RefusedError: a member is absolute, leaves the folder, occurs twice, is a device or pipe, links to the outside
            or is too large; the archive is damaged or lacks `name`. Files that were written before remain in `folder`.
    """
    return _Unpacker(stream, folder, name, limit_bytes, on_progress).run()


@dataclass
class _BoundedReader:
    """The stream for tarfile. `read` raises RefusedError if more is read than was allowed."""

    stream: IO[bytes]
    allowed: int = 0
    position: int = 0
    tail: bytes = b""
    """The bytes read last."""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.allowed -= len(data)
        if self.allowed < 0:
            raise RefusedError(f"a header of the archive is longer than {size_text(MAX_HEADER_BYTES)}")
        self.position += len(data)
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        return data

    def ends_at(self, offset: int) -> bool:
        """Return True if the archive has its end mark, a block of zeros, at `offset` of the stream."""
        start = offset - (self.position - len(self.tail))
        return start >= 0 and self.tail[start : start + tarfile.BLOCKSIZE] == b"\0" * tarfile.BLOCKSIZE


@dataclass
class _Unpacker:
    stream: IO[bytes]
    folder: Path
    name: str
    limit_bytes: int
    on_progress: Callable[[Received], None]
    received: Received = field(default_factory=Received)
    files: set[PurePosixPath] = field(default_factory=set)
    folders: dict[PurePosixPath, float] = field(default_factory=dict)
    """Folders that were made, and their modification times."""
    links: Links = field(init=False)
    """Symbolic links, to be created at the end."""

    def __post_init__(self) -> None:
        self.links = Links(self.name)

    def run(self) -> Received:
        reader = _BoundedReader(self.stream, MAX_HEADER_BYTES)
        header_bytes = member_end = 0
        with contextlib.ExitStack() as stack:
            with _damaged():
                archive = stack.enter_context(tarfile.open(fileobj=reader, mode="r|"))  # type: ignore[call-overload]
            for count in range(MAX_MEMBERS + 1):
                reader.allowed = MAX_HEADER_BYTES
                with _damaged():
                    member = archive.next()
                if member is None:
                    # tarfile takes a cut or unreadable header for the end of the archive.
                    if not reader.ends_at(archive.offset):
                        raise RefusedError("the archive is cut off or damaged")
                    break
                if count == MAX_MEMBERS:
                    raise RefusedError(f"the archive has more than {MAX_MEMBERS:,} members")
                # tarfile keeps every member and its headers, which a stream does not need.
                archive.members.clear()
                header_bytes += member.offset_data - member_end
                member_end = archive.offset
                _check_headers(header_bytes, archive)
                reader.allowed = max(member.size, 0) + MAX_HEADER_BYTES
                self._take(archive, member)
        self.links.check()
        self.links.create(self._new_file)
        for path, modified in reversed(self.folders.items()):
            set_time(self.folder / path, modified)
        if not os.path.lexists(self.folder / self.name):
            raise RefusedError(f"the archive does not hold {one_line(self.name)!r}")
        return self.received

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Check a member and write it."""
        path = local_path(member.name)
        if path.parts[0] != self.name:
            raise RefusedError(f"the archive holds {one_line(str(path), 80)!r}, expected only {one_line(self.name)!r}")
        for parent in path.parents:
            if parent in self.files or parent in self.links:
                raise RefusedError(f"{str(path)!r} is inside of something that is not a folder")
        if path in self.files or path in self.links.targets or path in self.folders:
            raise RefusedError(f"{str(path)!r} occurs twice")
        if member.isdir():
            with _taken(path):
                (self.folder / path).mkdir(parents=True, exist_ok=True)
            self.folders[path] = member.mtime
        elif member.isreg():
            self._write(archive, member, path)
        elif member.issym():
            self.links.add(path, member.linkname)
        elif member.islnk():
            self._link_to_file(path, local_path(member.linkname))
        else:
            raise RefusedError(f"{str(path)!r} is neither a file, a folder nor a link")

    def _write(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: PurePosixPath) -> None:
        if member.size < 0 or self.received.num_bytes + member.size > self.limit_bytes:
            raise RefusedError(
                f"{str(path)!r} has {member.size:,} bytes; with the {size_text(self.received.num_bytes)} before it, "
                f"that is more than the {size_text(max(self.limit_bytes, 0))} that may be written here"
            )
        target = self._new_file(path)
        with _damaged():
            source = archive.extractfile(member)
        assert source is not None  # a regular file
        written = 0
        with target.open("xb") as file:
            while True:
                with _damaged():
                    block = source.read(BLOCK_BYTES)
                if not block:
                    break
                file.write(block)
                written += len(block)
                self.received.num_bytes += len(block)
                self.on_progress(self.received)
        if written != member.size:
            raise RefusedError(f"{str(path)!r} ends after {written:,} of {member.size:,} bytes")
        # No setuid, setgid or sticky bit, nothing that others may write; the owner can read and write.
        target.chmod(member.mode & 0o755 | 0o600)
        set_time(target, member.mtime)
        self.files.add(path)
        self.received.num_files += 1

    def _link_to_file(self, path: PurePosixPath, source: PurePosixPath) -> None:
        if source not in self.files:
            raise RefusedError(f"{str(path)!r} is a hard link to {str(source)!r}, which is no file of the archive")
        os.link(self.folder / source, self._new_file(path))
        self.files.add(path)
        self.received.num_files += 1

    def _new_file(self, path: PurePosixPath) -> Path:
        """Return where a file of the archive is written; its folder exists then."""
        target = self.folder / path
        with _taken(path):
            target.parent.mkdir(parents=True, exist_ok=True)
        # On a filesystem that ignores case, another member may have this name.
        if os.path.lexists(target):
            raise RefusedError(f"{str(path)!r} occurs twice")
        return target


def _check_headers(header_bytes: int, archive: tarfile.TarFile) -> None:
    """Raise RefusedError if the headers so far take more memory or time than those of a folder need."""
    if header_bytes > MAX_ALL_HEADER_BYTES:
        raise RefusedError(f"the headers of the archive are longer than {size_text(MAX_ALL_HEADER_BYTES)}")
    if len(archive.pax_headers) > MAX_GLOBAL_HEADERS:
        raise RefusedError(f"the archive has more than {MAX_GLOBAL_HEADERS} global headers")


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    """Turn whatever tarfile raises on a damaged archive into RefusedError: TarError, but also errors of conversions."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"the archive is damaged: {one_line(str(error)) or type(error).__name__}") from error


@contextlib.contextmanager
def _taken(path: PurePosixPath) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise RefusedError(f"{str(path)!r} is inside of something that is not a folder") from error


def set_time(path: Path, modified: float) -> None:
    """Set the modification time of a file or folder."""
    # A time that this filesystem cannot hold is no reason to lose the file.
    with contextlib.suppress(OSError, OverflowError, ValueError):
        os.utime(path, (modified, modified))

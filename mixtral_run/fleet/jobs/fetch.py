"""`mixtral-run fetch`: copy the output of a job, or a path of a host, to this machine."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host, find_hosts, remembered_hosts
from mixtral_run.fleet.jobs.job_spec import JobOptions, host_path
from mixtral_run.fleet.jobs.jobs import find_job
from mixtral_run.fleet.jobs.unpack import Received, free_bytes, size_text, unpack
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.untrusted import local_name, one_line

QUIET_SECONDS = 10.0
"""Interval between two lines of progress."""
Say = Callable[[str], None]


class Source(Protocol):
    """What runs a command on a host and passes on its output: `Ssh`, or kubectl for a pod."""

    def receive(self, host: Host, command: Sequence[str]) -> AbstractContextManager[IO[bytes]]: ...


def fetch_job(
    what: str,
    destination: Path,
    on: Sequence[str] = (),
    overwrite: bool = False,
    folders: JobOptions | None = None,
    say: Say = lambda text: None,  # noqa: ARG005
) -> list[Path]:
    """Copy a job's output, or `HOST:PATH`, to this machine and return the local paths.

    Args:
        what: the name of a job, or HOST:PATH. PATH is a path on the host, or one below /checkpoints or /huggingface in
            the container, which `folders` maps to the host.
        destination: as for `cp`, an existing folder to copy into, else the new name.
        say: receives lines about progress and size.

    Raises:
        ConfigError: the job still runs or writes no files; or something of that name exists and `overwrite` is False.
        HostError: the host does not answer, or what it sends is refused.
    """
    host_word, colon, path = what.partition(":/")
    if colon:
        (host,) = find_hosts([host_word], remembered_hosts())
        path = host_path("/" + path, folders or JobOptions())
    else:
        row = find_job(what, hosts_of(tuple(on), None, None))[0]
        if row.running:
            raise ConfigError(f"{row.job} is still running.", next_command=f"mixtral-run logs -f {row.job}")
        if not row.output:
            raise ConfigError(f"{row.job} writes no files ({row.verb}).")
        host, path = row.host, row.output
    target = destination / _name_of(host, path) if destination.is_dir() else destination
    return [fetch(host, path, target, overwrite=overwrite, say=say)]


def fetch(
    host: Host,
    path: str,
    target: Path,
    ssh: Source | None = None,
    overwrite: bool = False,
    say: Say = lambda text: None,  # noqa: ARG005
) -> Path:
    """Copy a file or folder of a host to `target`, completely or not at all, and return `target`.

    What the host sends is checked member by member (`unpack`) and must fit on the disk. With `overwrite`, an existing
    `target` is replaced after everything has arrived.

    Raises:
        ConfigError: `target` exists and `overwrite` is False.
        HostError: the host does not answer, or what it sends is refused.
    """
    ssh = ssh or Ssh()
    name = _name_of(host, path)
    if target.exists() and not overwrite:
        raise ConfigError(
            "Something of this name already exists.",
            where=str(target),
            next_command="another folder, or --overwrite",
        )
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".mixtral-run-fetch-", dir=target.resolve().parent))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        received = _receive(ssh, host, path, new, say)
        if target.exists():
            target.rename(old)
        (new / name).rename(target)
    finally:
        if old.exists() and not target.exists():
            _put_back(old, target)
        shutil.rmtree(work, ignore_errors=True)
    say(f"  {received} from {host.name}")
    return target


def _put_back(old: Path, target: Path) -> None:
    """Give the earlier content its name again. Raises HostError that says where it is if the disk refuses that too."""
    try:
        old.rename(target)
    except OSError as error:
        raise HostError(
            "What was fetched cannot be put in its place, nor what was there before.",
            where=str(target),
            found=error.strerror,
            next_command=f"mv {old} {target}, which restores it, once the disk can be written to",
        ) from error


def _receive(ssh: Source, host: Host, path: str, folder: Path, say: Say) -> Received:
    """Unpack `path` of the host into `folder`."""
    source = PurePosixPath(path)
    script = 'cd "$1" && exec tar -cf - -- "$2"'
    limit = free_bytes(folder)
    with (
        ssh.receive(host, ["sh", "-c", script, "fetch", str(source.parent), source.name]) as stream,
        _refused(host, path),
    ):
        return unpack(stream, folder, source.name, limit_bytes=limit, on_progress=_progress(say, limit))
    raise AssertionError("receive() raises what the context raised")


@contextlib.contextmanager
def _refused(host: Host, path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise HostError(
            f"{path} could not be fetched from {host.name}: what the host sent is refused.",
            where=host.target,
            expected="a tar archive of one file or folder, with links only inside of it",
            found=str(error),
        ) from error


def _progress(say: Say, limit: int) -> Callable[[Received], None]:
    """Return a function that reports the amount received every QUIET_SECONDS."""
    last = time.monotonic()

    def report(received: Received) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_SECONDS:
            last = time.monotonic()
            say(f"… {received} so far; {size_text(max(limit - received.num_bytes, 0))} more fit here")

    return report


def _name_of(host: Host, path: str) -> str:
    """Return the local name for a path on a host. A path that a job reports comes from the host and is not trusted."""
    try:
        return local_name(PurePosixPath(path).name)
    except ValueError as error:
        raise HostError(
            f"A path on {host.name} does not end with the name of a file or folder.",
            where=host.target,
            expected="an absolute path such as /checkpoints/adapter",
            found=f"{one_line(path)!r}: {error}",
        ) from error

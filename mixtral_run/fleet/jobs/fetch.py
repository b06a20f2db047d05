"""`mixtral-run fetch`: copy the output of a job, or a path of a host, to this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from mixtral_run.config.names.store_names import store_url
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host, find_hosts, remembered_hosts
from mixtral_run.fleet.jobs.job_spec import JobOptions, host_path
from mixtral_run.fleet.jobs.jobs import find_job
from mixtral_run.fleet.jobs.transfer.listing import SCRIPT, Listing, read_listing
from mixtral_run.fleet.jobs.transfer.rsync import receive, why_not_here
from mixtral_run.fleet.jobs.transfer.unpack import Received, free_bytes, size_text, unpack
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.untrusted import local_name, one_line
from mixtral_run.run_lock import LOCK_NAME, one_run

PREFIX = ".mixtral-run-fetch-"
QUIET_SECONDS = 10.0
"""Interval between two lines of progress."""
Say = Callable[[str], None]


class Source(Protocol):
    """A connection that runs a command on a host and passes on its output: `Ssh`, or kubectl for a pod."""

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
        path = host_path("/" + path, (folders or JobOptions()).folders(host))
    else:
        row = find_job(what, hosts_of(tuple(on), None, None))[0]
        if row.running:
            raise ConfigError(f"{row.job} is still running.", next_command=f"mixtral-run logs -f {row.job}")
        if not row.output:
            raise ConfigError(f"{row.job} writes no files ({row.verb}).")
        refuse_store(row.job, row.output)
        host, path = row.host, row.output
    target = destination / _name_of(host, path) if destination.is_dir() else destination
    return [fetch(host, path, target, overwrite=overwrite, say=say)]


def refuse_store(job: str, output: str) -> None:
    """Raise ConfigError if the output of a job is in an object store."""
    url = store_url(output)
    if url is not None:
        is_s3 = url.startswith("s3://")
        raise ConfigError(
            f"The output of {job} is in an object store, and not on a host.",
            where=url,
            next_command=f"aws s3 cp --recursive {url} FOLDER" if is_s3 else "the store's own tool copies it",
        )


def fetch(
    host: Host,
    path: str,
    target: Path,
    ssh: Source | None = None,
    overwrite: bool = False,
    say: Say = lambda text: None,  # noqa: ARG005
) -> Path:
    """Copy a file or folder of a host to `target`, completely or not at all, and return `target`.

    What the host sends is checked file by file and must fit on the disk. With rsync on both sides, an interrupted fetch
    leaves what has arrived, and the next one continues. With `overwrite`, an existing `target` is replaced after
    everything has arrived.

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
    parent = target.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    reason: str | None = "kubectl copies without rsync"
    listing = None
    if isinstance(ssh, Ssh):
        reason = why_not_here()
        listing = None if reason else _list(ssh, host, path, name)
    if isinstance(ssh, Ssh) and listing is not None:
        received = _continue(ssh, host, path, listing, target, say)
    else:
        say(f"{reason or f'rsync is not installed on {host.name}'}: this fetch begins anew if it is interrupted.")
        work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            (work / "new").mkdir()
            received = _receive(ssh, host, path, work / "new", say)
            _put_in_place(work / "new" / name, target, work / "old")
        finally:
            # Not if the earlier content is still in it, because the disk refused to move it back.
            if target.exists() or not (work / "old").exists():
                shutil.rmtree(work, ignore_errors=True)
    say(f"  {received} from {host.name}")
    return target


def _put_in_place(new: Path, target: Path, old: Path) -> None:
    """Give what was fetched its name. What has the name is moved to `old`, and back if that fails."""
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            _put_back(old, target)


def _put_back(old: Path, target: Path) -> None:
    """Give the earlier content its name again. Raises HostError that says where it is if the disk refuses that too."""
    try:
        old.rename(target)
    except OSError as error:
        raise HostError(
            "What was fetched cannot be put in its place, nor what was there before.",
            where=str(target),
            found=error.strerror,
            next_command=f"{shlex.join(['mv', str(old), str(target)])}, which restores it, "
            "once the disk can be written to",
        ) from error


def _list(ssh: Ssh, host: Host, path: str, name: str) -> Listing | None:
    """Return the checked list of what is to be fetched; None if the host has no rsync."""
    source = PurePosixPath(path)
    argv = ["sh", "-c", SCRIPT, "fetch", str(source.parent), source.name]
    with ssh.receive(host, argv) as stream, _refused(host, path):
        return read_listing(stream, name)
    raise AssertionError("receive() raises what the context raised")


def _continue(ssh: Ssh, host: Host, path: str, listing: Listing, target: Path, say: Say) -> Received:
    """Receive the listed files into a folder next to the target, which an interrupted fetch leaves for the next one."""
    work = _work_folder(host, path, target)
    with one_run(work / LOCK_NAME, "mixtral-run fetch", target):
        new = work / "new"
        new.mkdir(exist_ok=True)
        listing.remove_others(new)
        amount, (here, _) = listing.amount, listing.received(new)
        limit = free_bytes(new) + here
        if amount.num_bytes > limit:
            raise HostError(
                f"{path} of {host.name} does not fit here.",
                where=str(target),
                expected=f"at most {size_text(max(limit, 0))}",
                found=str(amount),
                next_command="free space here, or another folder",
            )
        say(f"… {amount} on {host.name}" + (f"; {size_text(here)} are here from an earlier fetch" if here else ""))
        progress = _progress(say, limit)
        try:
            receive(
                ssh, host, PurePosixPath(path).parent, listing, new,
                lambda num_bytes: progress(Received(len(listing.files), num_bytes)),
            )  # fmt: skip
        except (HostError, KeyboardInterrupt):
            say(f"What has arrived stays in {work}; the same command continues.")
            raise
        try:
            with _refused(host, path):
                listing.check_arrived(new)
                listing.complete(new)
        except HostError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if target.exists():
            shutil.rmtree(
                work / "old", ignore_errors=True
            )  # of an attempt that was killed while it replaced the target
        _put_in_place(new / listing.name, target, work / "old")
    shutil.rmtree(work, ignore_errors=True)
    return amount


def _work_folder(host: Host, path: str, target: Path) -> Path:
    """Return a folder next to the target for this path of this host, new or from an interrupted fetch.

    Raises ConfigError if another user could have written to it.
    """
    key = hashlib.sha256(json.dumps([host.target, path, target.name]).encode()).hexdigest()[:16]
    work = target.resolve().parent / f"{PREFIX}{key}"
    with contextlib.suppress(FileExistsError):
        work.mkdir(mode=0o700)
    status = work.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            "The folder of an interrupted fetch may have been written to by others.",
            where=str(work),
            expected="a folder of this user with mode 0700",
            next_command=f"remove it: rm -r {shlex.quote(str(work))}",
        )
    return work


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
            expected="one file or folder, with links only inside of it",
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

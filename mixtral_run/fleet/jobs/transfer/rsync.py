"""Receiving files of a host with rsync over SSH, which continues what an earlier attempt left.

The host is not trusted. rsync is asked for a list of files by name, without folders, links and modes, and what arrived
is compared with the list afterwards.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.transfer.listing import Listing
from mixtral_run.fleet.ssh.connection import Ssh, connection_options, destination
from mixtral_run.fleet.ssh.problems import connection_error
from mixtral_run.fleet.ssh.streams import LastBytes
from mixtral_run.fleet.untrusted import one_line

OLDEST = (3, 2, 5)
"""From this version on rsync refuses files that were not asked for."""
WATCH_SECONDS = 0.2
SILENT_SECONDS = 300
"""A host that sends nothing for so long has failed, although ssh still answers there."""
SSH_FAILED = 255


def why_not_here() -> str | None:
    """Return why rsync cannot be used on this machine; None if it can."""
    try:
        done = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "rsync is not installed here"
    found = re.match(r"rsync\s+version v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})", done.stdout)
    if found is None or tuple(int(number) for number in found.groups()) < OLDEST:
        return f"rsync here is not version {'.'.join(map(str, OLDEST))} or newer"
    return None


def rsync_argv(host: Host, parent: PurePosixPath, folder: Path, known_hosts: Path) -> list[str]:
    """Return the command that receives files below `parent` of a host into `folder`.

    Their names, relative to `parent`, are read from standard input, each with a NUL after it.
    """
    *shell, _, address = ["ssh", *connection_options(known_hosts), *destination(host)]
    return [
        "rsync",
        "--files-from=-", "--from0", "--no-implied-dirs",
        # The remote shell must not read the names.
        "--protect-args",
        # A file grows in its place, so that it continues there also after this process was killed.
        "--inplace", "--times", "--fsync",
        f"--timeout={SILENT_SECONDS}",
        "--no-links", "--no-devices", "--no-specials", "--no-perms", "--no-owner", "--no-group", "--chmod=F600",
        "--rsh", " ".join(map(_quoted, shell)),
        "--", f"[{address}]:{parent}/" if ":" in address else f"{address}:{parent}/", f"{folder}/",
    ]  # fmt: skip


def _quoted(word: str) -> str:
    """Quote a word as rsync reads the words of --rsh, where a doubled quote is a quote."""
    return "'" + word.replace("'", "''") + "'"


def receive(
    ssh: Ssh, host: Host, parent: PurePosixPath, listing: Listing, folder: Path, on_progress: Callable[[int], None]
) -> None:
    """Receive the files of a listing into `folder`, and continue those that are there in part.

    on_progress: called several times a second with the bytes that are in `folder`.

    Raises:
        HostError: the connection was lost, a file cannot be read, or the host sends more than the listing has. What has
            arrived stays.
    """
    for path in sorted(listing.folders):
        (folder / path).mkdir(exist_ok=True)
    names = b"".join(os.fsencode(str(path)) + b"\0" for path in listing.files)
    if not names:
        return
    with _running(rsync_argv(host, parent, folder, ssh.known_hosts), names) as (process, errors):
        while process.poll() is None:
            began = time.monotonic()
            num_bytes, grown = listing.received(folder)
            if grown is not None:
                raise _too_much(host, grown)
            on_progress(num_bytes)
            try:
                # Looking at many thousands of files takes a while.
                process.wait(max(WATCH_SECONDS, 10 * (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                continue
    if process.returncode:
        raise _problem(host, process.returncode, errors.text())


@contextmanager
def _running(argv: list[str], names: bytes) -> Iterator[tuple[subprocess.Popen[bytes], LastBytes]]:
    """Start rsync; it ends with the block."""
    # Settings of the user's environment, such as RSYNC_RSH, are for the user's own calls.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RSYNC_")}
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        # Ctrl-C in a terminal signals its whole process group; this process ends rsync itself.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    errors = LastBytes(process.stderr)
    try:
        try:
            with process.stdin:
                process.stdin.write(names)
        except BrokenPipeError:
            process.wait()  # its messages say why
        yield process, errors
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _too_much(host: Host, path: PurePosixPath) -> HostError:
    """Return the error for a file that is larger than listed: nothing else bounds what a hostile host sends."""
    return HostError(
        f"{host.name} sends more than it listed.",
        where=host.target,
        found=f"{one_line(str(path), 80)} is larger",
        next_command="the same command, if the file was written to meanwhile",
    )


def _problem(host: Host, code: int, text: str) -> HostError:
    lines = [line for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("rsync error:")]
    # A connection that was lost later is no problem of the address, the user or the key.
    if code == SSH_FAILED and not re.search(r"\([1-9]\d* bytes received so far\)", text):
        return connection_error(host, text)
    return HostError(
        f"rsync did not receive all files from {host.name}.",
        where=host.target,
        found=" ".join((said or lines or [f"exit code {code}"])[0].split())[:300],
        next_command="the same command, which continues",
    )

"""Outputs that belong into a store: the checkpoints of a run, and folders that a verb writes once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixtral_run.errors import ConfigError
from mixtral_run.run_lock import LOCK_NAME, one_run
from mixtral_run.terminal.report import Report
from mixtral_run.weights.io.atomic_folder import GIB
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.store.folder import StoreFolder, open_store
from mixtral_run.weights.store.journal import Journal, send_missing
from mixtral_run.weights.store.local import OUTPUTS, VARIABLE, LocalCopy, local_copy
from mixtral_run.weights.store.marker import MARKER, Marker
from mixtral_run.weights.store.problems import store_error
from mixtral_run.weights.store.run_mirror import AbandonedError, Retention, RunMirror
from mixtral_run.weights.store.runs import bring_back, complete_iterations

_WAIT_SECONDS, _START_SECONDS = 0.2, 300.0
"""Time between two looks for the first process of a job; time after which it must have begun on a disk that is seen."""
_PROBE = ".mixtral-run-probe"
_HELD = "expected a new or empty folder, or"
SecondsLeft = Callable[[], float | None]
"""Time that is left for a copy at the end of a command; None for no limit."""


def folder_of(url: str) -> Path:
    """Return the folder of this machine in which an output is made."""
    return local_copy(url, OUTPUTS).folder


def _check_access(store: StoreFolder, what: str) -> None:
    """Raise the error of a store that cannot be written to, before any work is done."""
    try:
        store.write(_PROBE, b"")
        store.remove([_PROBE])
    except Exception as error:
        raise store_error(error, store.url, what) from error


@contextmanager
def run_output(
    url: str, resume: str | None, retention: Retention, report: Report, say: Callable[[str], object]
) -> Iterator[Callable[[SecondsLeft], None]]:
    """Prepare the folder of a run's checkpoints, and copy them while the block runs. Yields what waits for the rest.

    With --resume the newest complete iteration of the store is brought here first, if this machine has none that is as
    new. Raises ConfigError if the store's folder is not empty without --resume, or as `store_error` does.
    """
    store, local = open_store(url), local_copy(url, OUTPUTS)
    what = f"--save {url} cannot be used."
    with one_run(local.lock, "mixtral-run, which copies to a store", Path(url)):
        _check_access(store, what)
        try:
            objects = store.objects()
            complete = complete_iterations(store, objects)
            if objects and resume is None:
                raise _held(f"--save {url}", objects, "--resume")
            report.say(f"Checkpoints are saved in {local.folder}, and copied to {url}")
            if resume is not None:
                local.folder.mkdir(parents=True, exist_ok=True)
                bring_back(store, objects, complete, local.folder, report)
        except Exception as error:
            raise store_error(error, url, what) from error
        mirror = RunMirror(store, local, complete, retention, say)
        mirror.start()
        write_atomically(local.ready, _this_job())
        _begun(local).unlink(missing_ok=True)
        try:
            yield mirror.finish
        finally:
            local.ready.unlink(missing_ok=True)


def wait_for_first_process(url: str) -> None:
    """Return when the first process of this job, which torchrun started, has prepared the folder of a run.

    If that process fails, torchrun ends this one. Raises ConfigError if this host does not see that it has begun.
    """
    local = local_copy(url, OUTPUTS)
    until = time.monotonic() + _START_SECONDS
    while not _names_this_job(local.ready):
        if _names_this_job(_begun(local)):
            # It may copy a checkpoint here for hours.
            until = math.inf
        if time.monotonic() > until:
            raise ConfigError(
                "This host does not see the folder in which the first process of the job works.",
                where=str(local.folder),
                expected=f"{VARIABLE} on all hosts of the job, a folder on a file system that they share",
                found=f"on {socket.gethostname()} no sign of the first process in {_START_SECONDS:.0f} s; {VARIABLE} "
                f"is {os.environ.get(VARIABLE) or 'not set'}",
                next_command=f"the same command with --env {VARIABLE}=/checkpoints/stores",
            )
        time.sleep(_WAIT_SECONDS)


@contextmanager
def begun_here(url: str) -> Iterator[None]:
    """Show the other processes of this job, while the block runs or until the folder is ready, that the first works."""
    file = _begun(local_copy(url, OUTPUTS))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, _this_job())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _begun(local: LocalCopy) -> Path:
    """Return a file that other jobs, which the lock refuses later, do not write."""
    return local.ready.with_name(f"begun-{zlib.crc32(_this_job().encode()):08x}")


def _names_this_job(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8") == _this_job()
    return False


def _this_job() -> str:
    """Return a text that all processes of a job under torchrun share, and that no other job has."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return " ".join(os.environ.get(name, "") for name in names)


@contextmanager
def folder_output(
    url: str, overwrite: bool, settings: Mapping[str, Any], report: Report
) -> Iterator[Callable[[SecondsLeft], None] | None]:
    """Prepare the folder of an output that is written once. Yields what copies it.

    Yields None in place of it if an earlier command with the same settings has made the output and could not copy all
    of it: then the rest is copied at once, and there is nothing to do. Raises as `run_output` does.
    """
    store, local = open_store(url), local_copy(url, OUTPUTS)
    what = f"--output-path {url} cannot be used."
    text = json.dumps(dict(settings), sort_keys=True)
    with one_run(local.lock, "mixtral-run, which copies to a store", Path(url)):
        _check_access(store, what)
        try:
            objects = store.objects()
        except Exception as error:
            raise store_error(error, url, what) from error
        if MARKER not in objects and _is_made(local, text):
            report.say(f"{local.folder} is complete: only the copy to {url} is continued")
            _send(store, local, report, lambda: None)
            yield None
            return
        if objects and not overwrite:
            raise _held(f"--output-path {url}", objects, "--overwrite")
        local.made.unlink(missing_ok=True)

        def finish(seconds: SecondsLeft) -> None:
            write_atomically(local.made, text)
            _send(store, local, report, seconds)

        yield finish


def _is_made(local: LocalCopy, text: str) -> bool:
    try:
        return local.made.read_text(encoding="utf-8") == text and local.folder.is_dir()
    except OSError:
        return False


def _send(store: StoreFolder, local: LocalCopy, report: Report, seconds: SecondsLeft) -> None:
    """Copy a folder, its marker last; objects that do not belong to it are removed before."""

    def gate() -> None:
        left = seconds()
        if left is not None and left <= 0:
            raise AbandonedError

    folder = local.folder
    paths = [each for each in folder.rglob("*") if each.is_file() and each.name != LOCK_NAME]
    files = {each.relative_to(folder).as_posix(): each for each in paths}
    total = sum(each.stat().st_size for each in paths)
    report.say(f"Copying {total / GIB:,.2f} GiB of {folder} to {store.url} …")
    try:
        store.remove([MARKER])
        records, num_bytes = send_missing(store, files, Journal.read(local.journal), gate)
        store.remove([name for name in store.objects() if name not in files])
        store.write(MARKER, Marker(records).to_bytes())
    except Exception as error:
        error = TimeoutError("the time for it was over") if isinstance(error, AbandonedError) else error
        problem = store_error(error, store.url, "The output is made, and not copied yet.", in_a_run=True)
        problem.problems = (f"all of it is in {folder}",)
        problem.next_command = "the same command on this machine, which copies what is missing"
        raise problem from error
    report.done(f"copied to {store.url}, of which {num_bytes / GIB:,.2f} GiB now. {folder} may be removed")


def _held(flag: str, objects: Mapping[str, object], other: str) -> ConfigError:
    names = sorted(objects)
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return ConfigError(
        "Some settings are wrong.",
        problems=[f"{flag}: {_HELD} {other}; found {len(names):,} objects: {shown}"],
        next_command=f"the same command with another URL, or with {other}",
    )

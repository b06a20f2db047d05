"""Bring a folder of a store to this machine: only files that are missing or changed, with their checksums compared."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.run_lock import acquire, release
from mixtral_run.terminal.report import Report
from mixtral_run.weights.io.atomic_folder import GIB
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.store.folder import StoredObject, StoreFolder, open_store
from mixtral_run.weights.store.journal import Copied, Journal
from mixtral_run.weights.store.local import LocalCopy, local_copy
from mixtral_run.weights.store.marker import MARKER, FileRecord, is_safe_name
from mixtral_run.weights.store.problems import store_error
from mixtral_run.weights.store.runs import complete_iterations, read_marker
from mixtral_run.weights.store.transfer import check_space, receive

_ITERATION = re.compile(r"iter_(\d{7,18})")
_WAIT_SECONDS = 1.0
_WHAT = "The folder cannot be copied here."


@dataclass(frozen=True)
class Wanted:
    """Files of a folder in a store. marked: sizes and checksums come from a marker. iteration: that of a run."""

    files: dict[str, FileRecord | int]
    objects: dict[str, StoredObject]
    marked: bool
    iteration: int | None = None


def bring_here(url: str, report: Report) -> Path:
    """Return the folder of this machine that holds what a URL names, after copying what is missing.

    Of a run only its newest complete iteration is copied, or the one that the URL names. Other processes of this
    machine that want the same folder wait. Raises ConfigError, HostError or WeightsError.
    """
    found = _ITERATION.fullmatch(url.rpartition("/")[2])
    iteration = int(found[1]) if found else None
    base = url.rpartition("/")[0] if found else url
    local = local_copy(base, "inputs")
    with _own(local, url, report):
        journal = Journal.read(local.journal)
        try:
            store = open_store(base)
            _copy(store, _wanted(store, url, iteration), local, journal, report)
        except Exception as error:
            problem = store_error(error, url, _WHAT)
            if not isinstance(problem, HostError) or not _is_complete(local, journal):
                raise problem from error
            report.warn(f"{url} cannot be asked ({problem.found}): the copy of earlier in {local.folder} is used")
            return local.folder if iteration is None else local.folder / f"iter_{iteration:07d}"
    return local.folder if iteration is None else local.folder / f"iter_{iteration:07d}"


def _is_complete(local: LocalCopy, journal: Journal) -> bool:
    return local.made.is_file() and all(
        _size_of(local.folder / name) == each.record.size for name, each in journal.entries.items()
    )


@contextmanager
def _own(local: LocalCopy, url: str, report: Report) -> Iterator[None]:
    """Hold the lock of a copy; wait while another process copies the same folder."""
    told = False
    while True:
        try:
            descriptor = acquire(local.lock, "mixtral-run, which copies from a store", Path(url))
            break
        except ConfigError as error:
            if not told:
                report.say(f"  waiting for {error.found}, which copies {url} ({error.next_command})")
            told = True
            time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        release(local.lock, descriptor)


def _wanted(store: StoreFolder, url: str, iteration: int | None) -> Wanted:
    objects = store.objects()
    if not objects:
        raise FileNotFoundError(f"no objects below {store.root}")
    if MARKER in objects and iteration is None:
        return Wanted(dict(read_marker(store, MARKER).files), objects, marked=True)
    complete = complete_iterations(store, objects)
    chosen = max(complete, default=None) if iteration is None else iteration
    if chosen in complete:
        return Wanted(dict(complete[chosen].files), objects, marked=True, iteration=chosen)
    if iteration is not None or any(name.startswith("iter_") and name.endswith(f"/{MARKER}") for name in objects):
        raise ConfigError(
            "The store has no complete checkpoint of that name.",
            where=url,
            expected=f"a folder with {MARKER}, which is written last",
            found="complete: " + (", ".join(f"iter_{each:07d}" for each in sorted(complete)) or "none"),
        )
    odd = [name for name in objects if not is_safe_name(name)]
    if odd:
        raise ConfigError("The store's folder has names that this machine cannot have.", where=url, found=odd[0][:80])
    return Wanted({name: each.size for name, each in objects.items()}, objects, marked=False)


def _copy(store: StoreFolder, wanted: Wanted, local: LocalCopy, journal: Journal, report: Report) -> None:
    missing = {name: each for name, each in wanted.files.items() if not _is_here(name, each, wanted, local, journal)}
    num_bytes = sum(_size(each) for each in missing.values())
    check_space(local.folder, num_bytes, store.url)
    local.made.unlink(missing_ok=True)
    if missing:
        report.say(f"  copying {num_bytes / GIB:,.2f} GiB of {store.url} to {local.folder}")
    if missing and not wanted.marked:
        report.warn(
            f"{store.url} has no {MARKER} with checksums: only the sizes of its files are compared; "
            "mixtral-run verify --proof compares a converted checkpoint with its own"
        )
    journal.forget({*missing})
    with report.progress(num_bytes, "copied") as progress:
        for name, each in missing.items():
            crc = receive(store, name, local.folder / name, each, progress.advance)
            tag = wanted.objects[name].tag if name in wanted.objects else ""
            journal.note(name, Copied(FileRecord(_size(each), crc), tag))
    if wanted.iteration is not None:
        write_atomically(local.folder / LATEST, f"{wanted.iteration}\n")
    else:
        _remove_others(local, wanted, journal)
    write_atomically(local.made, "\n")


def _is_here(name: str, wanted: FileRecord | int, all_of_it: Wanted, local: LocalCopy, journal: Journal) -> bool:
    known = journal.entries.get(name)
    if known is None or _size_of(local.folder / name) != known.record.size:
        return False
    return known.record == wanted if isinstance(wanted, FileRecord) else known.is_in(all_of_it.objects, name)


def _remove_others(local: LocalCopy, wanted: Wanted, journal: Journal) -> None:
    """Remove the files of an earlier copy that the store's folder has no longer."""
    gone = {*journal.entries} - {*wanted.files}
    for name in gone:
        (local.folder / name).unlink(missing_ok=True)
    if gone:
        journal.forget(gone)


def _size(record: FileRecord | int) -> int:
    return record if isinstance(record, int) else record.size


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None

"""Copy the checkpoints of a run to a store while the run continues.

A thread looks for complete iterations in the folder of this machine, links their files so that a removal of old
checkpoints does not take them away, and copies them; the marker follows when all files are there. The folder of this
machine is never changed, so that no error of a store costs a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import MixtralRunError, WeightsError
from mixtral_run.results.run_files import TENSORBOARD
from mixtral_run.weights.io.atomic_folder import GIB
from mixtral_run.weights.manifest.adapter_files import TOKENIZER
from mixtral_run.weights.manifest.checkpoint_folder import LATEST, iteration_of, kept_iterations, newest_iteration
from mixtral_run.weights.manifest.manifest import read_iteration_manifest
from mixtral_run.weights.store.folder import StoreFolder
from mixtral_run.weights.store.journal import Journal, send_missing
from mixtral_run.weights.store.local import LocalCopy
from mixtral_run.weights.store.marker import MARKER, Marker
from mixtral_run.weights.store.problems import PASSING, LocalFileError, kind_of, store_error
from mixtral_run.weights.store.runs import RUN_FILES
from mixtral_run.weights.store.transfer import send

LOOK_SECONDS = 1.0
PAUSE_SECONDS = 15.0
"""Time between two attempts while the store fails. Each attempt repeats its calls itself."""
FINISH_SECONDS = 900.0
"""Time that a store which fails gets at the end of a run, counted from the last copy that succeeded."""
_WHAT = "Checkpoints are not copied yet."


class AbandonedError(Exception):
    """The time of a copy is over."""


@dataclass(frozen=True)
class Retention:
    """--keep-last and --keep-best, which hold in the store as well."""

    keep_last: int | None
    keep_best: bool


class RunMirror:
    """The copies of one run. `start` begins; `finish` waits for the rest. One process of a job has one.

    complete: the iterations that the store holds, which is brought up to date.
    """

    def __init__(
        self,
        store: StoreFolder,
        local: LocalCopy,
        complete: dict[int, Marker],
        retention: Retention,
        say: Callable[[str], object],
    ) -> None:
        self._store, self._local, self._complete = store, local, complete
        self._retention, self._say = retention, say
        self._journal = Journal.read(local.journal)
        self._same: set[int] = set()
        self._sent_files: dict[str, tuple[int, int]] = {}
        self._over, self._ended = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._until: float | None = None
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def finish(self, seconds: Callable[[], float | None]) -> None:
        """Wait until everything is copied. Raises the error that says what is not.

        seconds: asked again and again; the time that is left, or None for no limit but that of a store which fails.
        """
        self._over.set()
        self._moved = time.monotonic()
        while self._thread.is_alive():
            self._ended.wait(0.2)
            left = seconds()
            if left is not None:
                self._until = time.monotonic() + left
            if (left is not None and left <= 0) or self._fails_for_long():
                break
        if self._thread.is_alive():
            self._until = 0.0
            self._thread.join(5)
        shutil.rmtree(self._local.sending, ignore_errors=True)
        missing = self._pending()
        if missing or self._error is not None:
            raise self._problem(missing)

    def _problem(self, missing: list[int]) -> MixtralRunError:
        error = self._error or TimeoutError("the time for it was over")
        problem = store_error(error, self._store.url, _WHAT, in_a_run=True)
        names = ", ".join(f"iter_{each:07d}" for each in sorted(missing)) or "the files about the run"
        problem.problems = (f"not in the store: {names}", f"all of them are in {self._local.folder}")
        problem.next_command = "the same command with --resume auto on this machine, which copies what is missing"
        return problem

    def _fails_for_long(self) -> bool:
        return self._error is not None and time.monotonic() - self._moved > FINISH_SECONDS

    def _run(self) -> None:
        try:
            while True:
                over = self._over.is_set()
                try:
                    has_sent = self._step()
                    if self._error is not None:
                        self._say(f"✓ {self._store.url} answers again")
                    self._error = None
                except AbandonedError:
                    return
                except Exception as error:
                    self._note(error)
                    if over and kind_of(error) != PASSING:
                        return
                    self._over.wait(PAUSE_SECONDS) if not over else self._pause()
                    continue
                if has_sent:
                    self._moved = time.monotonic()
                elif over:
                    return
                else:
                    self._over.wait(LOOK_SECONDS)
        finally:
            self._ended.set()

    def _pause(self) -> None:
        until = time.monotonic() + PAUSE_SECONDS
        while time.monotonic() < until and (self._until is None or time.monotonic() < self._until):
            time.sleep(0.1)

    def _note(self, error: Exception) -> None:
        if self._error is None:
            try:
                problem = store_error(error, self._store.url, _WHAT, in_a_run=True)
                words = f"{problem.what} {problem.found or ''}".strip()
            except Exception:
                words = f"{_WHAT} {type(error).__name__}: {error}"
            self._say(f"! {self._store.url}: {words} They are in {self._local.folder}, and are copied later")
        self._error = error

    def _gate(self) -> None:
        if self._until is not None and time.monotonic() >= self._until:
            raise AbandonedError

    def _step(self) -> bool:
        """Copy the newest iteration that the store lacks; else what else has changed. Return True if there was any."""
        self._gate()
        pending = self._pending()
        if pending:
            return self._send_iteration(pending[0])
        return self._over.is_set() and self._send_run_files()

    def _folders(self) -> dict[int, Path]:
        """Return the iterations of this machine that are complete."""
        try:
            newest = iteration_of(newest_iteration(self._local.folder))
        except WeightsError:
            return {}
        found = {iteration_of(each): each for each in self._local.folder.glob("iter_*")}
        return {iteration: each for iteration, each in found.items() if 0 < iteration <= newest}

    def _pending(self) -> list[int]:
        """Return the iterations of this machine that the store does not hold as they are, the newest first."""
        folders = self._folders()
        for iteration in {*folders} & {*self._complete} - self._same:
            if _is_same(folders[iteration], self._complete[iteration]):
                self._same.add(iteration)
        return sorted({*folders} - self._same, reverse=True)

    def _send_iteration(self, iteration: int) -> bool:
        began, name = time.monotonic(), f"iter_{iteration:07d}"
        source = self._linked(iteration)
        if source is None:
            return True  # removed meanwhile
        manifest = read_iteration_manifest(source)
        files = {f"{name}/{each.name}": each for each in source.iterdir() if each.is_file()}
        tokenizer = self._local.folder / TOKENIZER
        files |= {f"{TOKENIZER}/{each.name}": each for each in tokenizer.glob("*") if each.is_file()}
        self._complete.pop(iteration, None)
        self._store.remove([f"{name}/{MARKER}"])
        records, num_bytes = send_missing(self._store, files, self._journal, self._gate)
        damaged = [each for each, crc in manifest.files.items() if records[f"{name}/{each}"].crc32 != f"{crc:08x}"]
        self._same.add(iteration)
        if damaged:
            self._say(f"! {self._local.folder / name} is damaged and stays without a marker in the store: {damaged[0]}")
            return True
        self._send_run_files()
        marker = Marker(records, manifest.state.validation_loss)
        self._store.write(f"{name}/{MARKER}", marker.to_bytes())
        self._complete[iteration] = marker
        if iteration == max(self._same):
            self._store.write(LATEST, f"{iteration}\n".encode())
        seconds = time.monotonic() - began
        self._say(f"copied {self._store.url}/{name} ({num_bytes / GIB:,.2f} GiB in {seconds:.1f} s)")
        shutil.rmtree(self._local.sending, ignore_errors=True)
        self._remove_old()
        return True

    def _linked(self, iteration: int) -> Path | None:
        """Return a folder of links to the files of an iteration; None if it is gone.

        Where the disk has no links, return the iteration's own folder.
        """
        folder, links = self._folders().get(iteration), self._local.sending / f"iter_{iteration:07d}"
        if folder is None:
            return None
        shutil.rmtree(self._local.sending, ignore_errors=True)
        links.mkdir(parents=True)
        try:
            for each in folder.iterdir():
                os.link(each, links / each.name)
        except FileNotFoundError:
            return None
        except OSError:
            return folder
        return links if folder.is_dir() else None

    def _send_run_files(self) -> bool:
        """Copy metrics, report and scalars if they have changed. Return True if any has."""
        folder = self._local.folder
        files = [folder / name for name in RUN_FILES]
        files += [each for each in (folder / TENSORBOARD).rglob("*") if each.is_file()]
        changed = False
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                state = file.stat()
                now = (state.st_mtime_ns, state.st_size)
                name = file.relative_to(folder).as_posix()
                if self._sent_files.get(name) != now:
                    with contextlib.suppress(LocalFileError):
                        send(self._store, name, file, self._gate)
                    self._sent_files[name] = now
                    changed = True
        return changed

    def _remove_old(self) -> None:
        """Remove iterations that --keep-last does not keep and that this machine has no longer. The marker goes first.

        An iteration of an earlier machine counts as well.
        """
        if self._retention.keep_last is None:
            return
        losses = {iteration: marker.validation_loss for iteration, marker in self._complete.items()}
        kept = kept_iterations(losses, self._retention.keep_last, keep_best=self._retention.keep_best)
        for iteration in sorted({*losses} - kept - {*self._folders()}):
            name = f"iter_{iteration:07d}"
            files = {each for each in self._complete[iteration].files if each.startswith(f"{name}/")}
            self._store.remove([f"{name}/{MARKER}", *sorted(files)])
            del self._complete[iteration]
            self._journal.forget(files)
            self._say(f"removed {self._store.url}/{name}")


def _is_same(folder: Path, marker: Marker) -> bool:
    """Return True if a marker has the checksums that the manifest of an iteration has for its files."""
    try:
        manifest = read_iteration_manifest(folder)
    except WeightsError:
        return False
    in_store = {name.rpartition("/")[2]: each.crc32 for name, each in marker.files.items() if name.startswith("iter_")}
    return bool(manifest.files) and all(in_store.get(name) == f"{crc:08x}" for name, crc in manifest.files.items())

"""The checkpoints of a run in a store: which are complete, and the newest one brought back for --resume."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mixtral_run.errors import WeightsError
from mixtral_run.results.run_files import ALL_FILES, TENSORBOARD, WANDB
from mixtral_run.terminal.report import Report
from mixtral_run.weights.io.atomic_folder import GIB
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.adapter_files import TOKENIZER, file_problems
from mixtral_run.weights.manifest.checkpoint_folder import LATEST, iteration_of
from mixtral_run.weights.manifest.manifest import read_iteration_manifest
from mixtral_run.weights.store.folder import StoredObject, StoreFolder
from mixtral_run.weights.store.marker import MARKER, Marker, is_safe_name
from mixtral_run.weights.store.transfer import PARTIAL, check_space, receive, receive_all

RUN_FILES = tuple(name for name in ALL_FILES if name not in (WANDB, TENSORBOARD))


def read_marker(store: StoreFolder, name: str) -> Marker:
    """Read a marker. Raises WeightsError if it is damaged."""
    return Marker.from_bytes(store.read(name), f"{store.url}/{name}")


def complete_iterations(store: StoreFolder, objects: Mapping[str, StoredObject]) -> dict[int, Marker]:
    """Return the markers of the iterations of which all files are there, by iteration. A damaged marker is none."""
    found = {}
    for name in objects:
        path = PurePosixPath(name)
        iteration = iteration_of(Path(path.parts[0])) if len(path.parts) == 2 and path.name == MARKER else 0
        if not iteration:
            continue
        try:
            marker = read_marker(store, name)
        except WeightsError:
            continue
        if all(file in objects and objects[file].size == each.size for file, each in marker.files.items()):
            found[iteration] = marker
    return found


def newest_sound(folder: Path) -> int:
    """Return the newest iteration in a folder of this machine whose files are what was written; 0 without one."""
    found = {iteration_of(each): each for each in folder.glob("iter_*") if each.is_dir() and iteration_of(each)}
    for iteration in sorted(found, reverse=True):
        try:
            manifest = read_iteration_manifest(found[iteration])
        except WeightsError:
            continue
        if not file_problems(found[iteration], manifest.files, manifest.files):
            return iteration
    return 0


def bring_back(
    store: StoreFolder, objects: Mapping[str, StoredObject], complete: dict[int, Marker], folder: Path, report: Report
) -> None:
    """Copy the newest complete iteration of a run here, if this machine has none that is as new.

    An iteration that turns out to be damaged in the store is removed from `complete`, reported, and the one before it
    is taken. A copy that was cut off continues; those of other iterations are removed, as they take space.
    """
    here = newest_sound(folder)
    for iteration in sorted(complete, reverse=True):
        if iteration <= here:
            return
        name, marker = f"iter_{iteration:07d}", complete[iteration]
        partial = folder / f".{name}.partial"
        own = {file: each for file, each in marker.files.items() if file.startswith(f"{name}/")}
        num_there = _continue_with(partial, {file.removeprefix(f"{name}/"): each.size for file, each in own.items()})
        check_space(folder, sum(each.size for each in marker.files.values()) - num_there, store.url)
        try:
            report.say(f"Copying {store.url}/{name} to {folder} …")
            if num_there:
                report.say(f"  {num_there / GIB:,.2f} GiB of it are there already")
            for file, each in own.items():
                receive(store, file, partial / file.removeprefix(f"{name}/"), each)
            rest = {file: each for file, each in marker.files.items() if file.startswith(f"{TOKENIZER}/")}
            receive_all(store, rest, folder)
        except WeightsError as error:
            shutil.rmtree(partial, ignore_errors=True)
            report.warn(f"{store.url}/{name} is damaged and is not used: {error.where}, {error.found}")
            del complete[iteration]
            continue
        _take(folder, name, partial, iteration, report)
        _bring_run_files(store, objects, folder)
        return


def _continue_with(partial: Path, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a copy that was cut off, and remove all else that is partial. sizes: of its files by name."""
    for other in {*partial.parent.glob(".iter_*.partial")} - {partial}:
        shutil.rmtree(other, ignore_errors=True)
    # A save that was cut off has the same name, and perhaps files of another number of processes.
    for file in partial.glob("*"):
        if file.name.removesuffix(PARTIAL) not in sizes:
            file.unlink()
    return sum(_continued(partial / name, size) for name, size in sizes.items())


def _continued(file: Path, size: int) -> int:
    """Return the bytes of a file that an earlier copy left, and let `receive` continue with them.

    A file that is complete gets the name of a part again: `receive` then compares its checksum and asks for nothing.
    """
    part = file.with_name(file.name + PARTIAL)
    with contextlib.suppress(FileNotFoundError):
        file.replace(part)
    with contextlib.suppress(FileNotFoundError):
        found = part.stat().st_size
        return found if found <= size else 0
    return 0


def _take(folder: Path, name: str, partial: Path, iteration: int, report: Report) -> None:
    final = folder / name
    if final.exists():
        aside = folder / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        report.warn(f"{final} is damaged: the copy of the store is used in its place. It is now {aside.name}")
    partial.rename(final)
    write_atomically(folder / LATEST, f"{iteration}\n")


def _bring_run_files(store: StoreFolder, objects: Mapping[str, StoredObject], folder: Path) -> None:
    """Copy metrics, evaluations and scalars: a run that goes on appends to them."""
    for name, each in objects.items():
        if name in RUN_FILES or (name.startswith(f"{TENSORBOARD}/") and is_safe_name(name)):
            (folder / name).unlink(missing_ok=True)
            receive(store, name, folder / name, each.size)

"""Write a folder atomically: into a work folder next to it, which is renamed once it is complete.

An output folder that is a mount point cannot be replaced. There the work folder is inside of it, and its content is
moved up at the end; the marker file that makes the folder a complete one is moved last.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mixtral_run.errors import WeightsError
from mixtral_run.run_lock import LOCK_NAME, acquire, check_held, is_held, lock_problems, release, stop_signs
from mixtral_run.weights.io.disk import exchange
from mixtral_run.weights.io.files import replaced_folder, sync_path, write_atomically

GIB = 2**30
NO_SPACE = "no space on the disk of"
_CAN_OVERWRITE = "--overwrite replaces it"
_MOVING = ".moving.json"
"""File in the work folder while its content is moved up; it lists the new entries and those that they replace."""


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(_nearest(path)).free


def on_one_disk(first: Path, second: Path) -> bool:
    """Return True if both paths, which need not exist yet, are on the same disk."""
    return _nearest(first.absolute()).stat().st_dev == _nearest(second.absolute()).stat().st_dev


def _nearest(path: Path) -> Path:
    """Return the deepest folder of the path that exists, as far as this user may look."""
    while not os.access(path, os.F_OK):
        path = path.parent
    return path


def writing_problems(folder: Path, flag: str) -> list[str]:
    """Return the reasons why this user cannot create `folder` or write into it."""
    nearest = _nearest(folder.absolute())
    if not nearest.is_dir():
        return [f"{flag}: {nearest} is a file"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{flag}: {nearest} cannot be written to by this user"]
    if nearest == folder.absolute() and not os.access(nearest, os.R_OK):
        return [f"{flag}: {nearest} cannot be read by this user"]
    return []


def output_problems(output: Path, *, overwrite: bool, is_ours: Callable[[Path], bool], what: str) -> list[str]:
    """Return the reasons why `output` cannot be written. is_ours: True for a folder that --overwrite may replace."""
    flag = f"--output-path {output}"
    problems = writing_problems(output, flag)
    if problems:
        return problems
    problems = lock_problems(work_folder(output) / LOCK_NAME, flag)
    if problems:
        return problems
    entries = [entry.name for entry in output.iterdir()] if output.is_dir() else []
    held = sorted(set(entries) - {work_folder(output).name, LOCK_NAME, "lost+found"} - _being_moved(output))
    if not held:
        return []
    shown = ", ".join(held[:3]) + (", …" if len(held) > 3 else "")
    if not is_ours(output):
        also = "; --overwrite replaces nothing else" if overwrite else ""
        return [f"{flag}: expected an empty or new folder{f' or {what}' if overwrite else ''}; found {shown}{also}"]
    if not overwrite:
        return [f"{flag}: expected an empty or new folder; found {what} ({_CAN_OVERWRITE})"]
    return []


def next_output(problems: Sequence[str]) -> str | None:
    """Return what to do next if problems of `output_problems` or `disk_problems` are among `problems`, else None."""
    if not any(each.startswith(("--output-path ", NO_SPACE)) for each in problems):
        return None
    space = "free space there, or " if any(each.startswith(NO_SPACE) for each in problems) else ""
    return f"{space}the same command with another --output-path" + (
        ", or with --overwrite" if any(_CAN_OVERWRITE in each for each in problems) else ""
    )


def disk_problems(output: Path, needed: int) -> list[str]:
    """Return a problem if the result does not fit on the disk; an earlier result stays until the new one is complete.

    The list is empty if the folder cannot be written for other reasons: then its content cannot be measured either.
    """
    if writing_problems(output, ""):
        return []
    free = free_bytes(output.absolute()) + allocated_bytes(work_folder(output))
    free += sum(allocated_bytes(output / name) for name in _being_moved(output))
    if free >= needed:
        return []
    return [
        f"{NO_SPACE} {output}: expected {needed / GIB:,.2f} GiB free ({needed:,} bytes); "
        f"found {free / GIB:,.2f} GiB ({free:,} bytes)"
    ]


def allocated_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on the disk; an unfinished run's work folder is reused or removed."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _being_moved(output: Path) -> frozenset[str]:
    """Return the entries that an interrupted process was moving into the folder or removing from it.

    Empty if the folder is complete: the move had not begun, or was all but done.
    """
    try:
        note = json.loads((work_folder(output) / _MOVING).read_text(encoding="utf-8"))
        names = [each for each in (*note["old"], *note["new"]) if Path(each).name == each]
        return frozenset() if (output / note["marker"]).exists() else frozenset(names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()


def work_folder(output: Path) -> Path:
    """Return the folder in which `output` is written until it is complete."""
    resolved = output.resolve()
    if _stays(resolved):
        return resolved / ".mixtral-run-unfinished"
    return resolved.parent / f".{resolved.name}.unfinished"


def _stays(output: Path) -> bool:
    """Return True if the folder itself cannot be replaced by a rename."""
    if output.is_mount() or (output.is_dir() and not os.access(output.parent, os.W_OK | os.X_OK)):
        return True
    # A bind mount within one file system looks like a plain folder to stat.
    mounts = Path("/proc/self/mountinfo")
    points = (line.split()[4] for line in mounts.read_text().splitlines()) if mounts.is_file() else ()
    return str(output) in points


class Staging:
    """The work folder, locked by one process at a time.

    A context manager: unless it was published or `keep` is set, the folder is removed at the end. `folder` may hold
    what an earlier process left; `clear` removes it. command: the command that writes, which the lock names to others.
    """

    def __init__(self, output: Path, marker: str, command: str) -> None:
        self.output = output.resolve()
        self.folder = work_folder(output)
        self.marker = marker
        self.keep = False
        self._command = command
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        self._lock = acquire(self.folder / LOCK_NAME, self._command, self.output)
        try:
            self._take_back()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        # What another run has taken meanwhile is its own.
        if is_held(self._lock):
            self._take_back()
            if not self.keep:
                stop_signs(self._lock)
                shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        assert self._lock is not None
        release(self.folder / LOCK_NAME, self._lock)
        self._lock = None

    def clear(self) -> None:
        """Remove the content of the folder."""
        for entry in self.folder.iterdir():
            if entry.name != LOCK_NAME:
                _remove(entry)

    def publish(self, spent: tuple[str, ...] = ()) -> None:
        """Put the complete folder in its place, then remove what was there before.

        spent: files that only the work needed; they are removed at the very end. Raises HostError if another run has
        taken the work folder meanwhile.
        """
        assert self._lock is not None
        sync_tree(self.folder)
        check_held()
        stop_signs(self._lock)
        spent = (*spent, LOCK_NAME)
        if _stays(self.output):
            self._move_up(spent)
        else:
            self._rename()
            for name in spent:
                (self.output / name).unlink(missing_ok=True)
        self._release()

    def _rename(self) -> None:
        replaced = replaced_folder(self.output)
        shutil.rmtree(replaced, ignore_errors=True)
        if self.output.is_dir() and exchange(self.folder, self.output):
            replaced = self.folder
        else:
            if self.output.is_dir():
                self.output.rename(replaced)
            self.folder.rename(self.output)
        sync_path(self.output.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _move_up(self, spent: tuple[str, ...]) -> None:
        old = [entry for entry in self.output.iterdir() if entry.name not in (self.folder.name, "lost+found")]
        new = [entry for entry in self.folder.iterdir() if entry.name not in spent]
        note = {"marker": self.marker, "old": [entry.name for entry in old], "new": [entry.name for entry in new]}
        write_atomically(self.folder / _MOVING, json.dumps(note))
        sync_path(self.folder)
        # The marker of the old folder is removed first: from here on the folder is not complete.
        for entry in sorted(old, key=lambda entry: entry.name != self.marker):
            _remove(entry)
        for entry in sorted(new, key=lambda entry: entry.name == self.marker):
            sync_path(self.output)
            entry.rename(self.output / entry.name)
        sync_path(self.output)
        shutil.rmtree(self.folder)

    def _take_back(self) -> None:
        """Undo an interrupted move: entries that are in the output folder already were made here and are complete."""
        note = self.folder / _MOVING
        if not note.is_file():
            return
        moved = self._noted(note)
        if not (self.output / self.marker).exists():
            for name in moved:
                if not (self.folder / name).exists() and (self.output / name).exists():
                    (self.output / name).rename(self.folder / name)
        elif not (self.folder / self.marker).exists():
            self.clear()  # everything was moved
        note.unlink(missing_ok=True)

    def _noted(self, note: Path) -> list[str]:
        """Return the entries that an interrupted move was about. Raises WeightsError if its note is damaged."""
        try:
            names = json.loads(note.read_text(encoding="utf-8"))["new"]
            if isinstance(names, list) and all(isinstance(each, str) and Path(each).name == each for each in names):
                return names
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        raise WeightsError(
            "The note of an interrupted move is damaged: it is not known which files were moved.",
            where=str(note),
            expected="the names of files in this folder",
            next_command=f"rm -r {shlex.quote(str(self.folder))}, then the same command with --overwrite",
        )


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below is on the disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)

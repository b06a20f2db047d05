"""Write single files atomically, wait until they are on the disk, and find what an interrupted replacement left."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def replaced_folder(folder: Path) -> Path:
    """Return the name of a folder that is being replaced, on file systems that cannot exchange two folders."""
    return folder.parent / f".{folder.name}.replaced"


def how_to_restore(folder: Path) -> str | None:
    """Return a command that restores the folder which an interrupted --overwrite moved aside; None without one."""
    temporary = replaced_folder(folder)
    if folder.exists() or not temporary.is_dir():
        return None
    command = shlex.join(["mv", str(temporary), str(folder)])
    return f"{command}, which --overwrite had moved aside when it was cut off; or that command again"


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name, fsync, rename: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync_folder_and_files(folder: Path) -> None:
    """Call fsync on a folder and the files in it."""
    for path in [*folder.iterdir(), folder]:
        if path.is_dir() and path != folder:
            continue
        sync_path(path)


def sync_path(path: Path) -> None:
    """Call fsync on one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

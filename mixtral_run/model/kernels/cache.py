"""The folder in which compiled kernels are cached, and the kernels that the image holds (model/compile_kernels.py)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

FOLDER_VARIABLE = "MIXTRAL_RUN_KERNELS"
"""Environment variable: the folder of kernels that the image holds."""


def cache_folder() -> Path:
    """Return the folder in which Triton and hopper_grouped_mm.py cache what they compile."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def copy_compiled(source: Path, target: Path) -> int:
    """Copy the entries of a folder of compiled kernels that `target` lacks, and return their number.

    Several processes may do so at once. An entry that cannot be read or written is compiled when it is needed.
    """
    copied = 0
    for entry in _entries(source):
        # ValueError: a list of files that is damaged.
        with contextlib.suppress(OSError, ValueError):
            final = target / entry.name
            if final.exists():
                continue
            target.mkdir(parents=True, exist_ok=True)
            _copy_entry(entry, final)
            copied += 1
    return copied


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, and nothing if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _copy_entry(entry: Path, final: Path) -> None:
    """Copy an entry, which gets its name when it is complete.

    Raises OSError, or ValueError if it is damaged. A process that ends meanwhile leaves a temporary folder.
    """
    # Not a TemporaryDirectory: in a daemon thread, the end of the process would empty it while the entry is renamed.
    own = Path(tempfile.mkdtemp(dir=final.parent))
    try:
        made = own / entry.name
        if entry.is_dir():
            shutil.copytree(entry, made)
            for group in made.glob("__grp__*"):
                # Triton lists the files of an entry by their absolute paths.
                text = group.read_text().replace(str(entry), str(final))
                json.loads(text)
                group.write_text(text)
        else:
            shutil.copyfile(entry, made)
        made.rename(final)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def copy_from_image() -> int:
    """Copy what the image has compiled into this process's cache; return the number of entries."""
    folder = os.environ.get(FOLDER_VARIABLE)
    try:
        return copy_compiled(Path(folder), cache_folder()) if folder else 0
    except RuntimeError:
        # This user has no home. What needs the cache says so.
        return 0

"""The folder in which compiled kernels are cached, and the kernels that the image holds (model/compile_kernels.py)."""

from __future__ import annotations

import contextlib
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

    Several processes may do so at once. An entry that cannot be written is compiled when it is needed.
    """
    copied = 0
    for entry in sorted(source.iterdir()) if source.is_dir() else ():
        final = target / entry.name
        if final.exists():
            continue
        with contextlib.suppress(OSError):
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target) as own:
                made = Path(own) / entry.name
                if entry.is_dir():
                    shutil.copytree(entry, made)
                    for group in made.glob("__grp__*"):
                        # Triton lists the files of an entry by their absolute paths.
                        group.write_text(group.read_text().replace(str(entry), str(final)))
                else:
                    shutil.copyfile(entry, made)
                made.rename(final)
                copied += 1
    return copied


def copy_from_image() -> int:
    """Copy what the image has compiled into this process's cache; return the number of entries."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return copy_compiled(Path(folder), cache_folder()) if folder else 0

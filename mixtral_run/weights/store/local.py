"""Where copies of a store's folders are on this machine: MIXTRAL_RUN_STORE_CACHE, else in the cache of Hugging Face."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.home_folder import expanded
from mixtral_run.run_lock import LOCK_NAME
from mixtral_run.weights.store.folder import hf_home

VARIABLE = "MIXTRAL_RUN_STORE_CACHE"
OUTPUTS = "outputs"
"""Folder of the copies of what this machine writes."""


@dataclass(frozen=True)
class LocalCopy:
    """The folder of a copy, and what the kit notes next to it."""

    folder: Path

    @property
    def journal(self) -> Path:
        return self.folder.parent / "copied.json"

    @property
    def made(self) -> Path:
        """Return the file with the settings of an output that is complete here."""
        return self.folder.parent / "made.json"

    @property
    def sending(self) -> Path:
        """Return the folder of links to the files that are being sent, which a removal of old checkpoints spares."""
        return self.folder.parent / "sending"

    @property
    def ready(self) -> Path:
        """Return the file that names the job whose first process has prepared the folder."""
        return self.folder.parent / "ready"

    @property
    def lock(self) -> Path:
        return self.folder.parent / LOCK_NAME


def cache_root() -> Path:
    """Return the folder of all copies."""
    given = os.environ.get(VARIABLE)
    return expanded(given).absolute() if given else hf_home().absolute() / "mixtral-run-stores"


def is_output_copy(folder: Path) -> bool:
    """Return True if what is written into a folder is copied to a store, as of --save s3://…."""
    return folder.absolute().parent.parent == cache_root() / OUTPUTS


def local_copy(url: str, kind: str) -> LocalCopy:
    """Return the place of a copy. kind: inputs or OUTPUTS, which never share files."""
    name = url.rpartition("/")[2]
    return LocalCopy(cache_root() / kind / f"{name}-{zlib.crc32(url.encode()):08x}" / name)

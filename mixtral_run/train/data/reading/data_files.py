"""Files of a source: a file, the files of a folder, a saved dataset, a dataset on the hub. All yield records."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.data_sources import STANDARD_INPUT, DataSource, how_to_find
from mixtral_run.errors import ConfigError, escaped, shortened
from mixtral_run.train.data.reading.formats import CSV, JSON, JSONL, format_of, open_bytes
from mixtral_run.train.data.reading.records import BadRecord, Record
from mixtral_run.train.data.reading.table_records import (
    SAVED_DATASET,
    SAVED_SPLITS,
    chosen_split,
    hub_records,
    saved_records,
    table_records,
)
from mixtral_run.train.data.reading.text_records import csv_records, json_records, jsonl_records

_DATA_SUFFIX = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|feather)(\.(gz|zst|zstd|bz2|xz))?$", re.IGNORECASE)
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Words in the names of files that name a split, as datasets reads them."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a source, a saved dataset, or a dataset on the hub. name: of the file among several."""

    source: DataSource
    path: Path | None
    name: str

    def records(self, where: str) -> Iterator[Record | BadRecord]:
        """Yield the records in their order. Raises ConfigError if the file is of no format that is read, or damaged."""
        try:
            if self.path is None:
                yield from hub_records(self.source, where)
            elif self.path.is_dir():
                yield from saved_records(self.path, where)
            else:
                yield from _records_of_file(self.path, where)
        except OSError as error:
            raise ConfigError("The data cannot be read.", where=where, found=error.strerror or str(error)) from error


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """Files of a source in their order, and a line about those of a folder that are left out; None if none are."""

    files: tuple[DataFile, ...]
    left_out: str | None = None


def _records_of_file(path: Path, where: str) -> Iterator[Record | BadRecord]:
    found = format_of(path, where)
    if found.name is None:
        return
    with open_bytes(path, found.compression, where) as stream:
        if found.name == JSONL:
            yield from jsonl_records(stream, found.encoding, where)
        elif found.name == JSON:
            yield from json_records(stream, found.encoding, where)
        elif found.name == CSV:
            yield from csv_records(stream, found.encoding, found.delimiter, where)
        else:
            yield from table_records(stream, path, found.name, where)


def files_of(source: DataSource, where: str) -> FoundFiles:
    """Return the files of a source. Raises ConfigError if there are none."""
    if source.on_hub:
        return FoundFiles((DataFile(source, None, source.name),))
    path = source.path
    if source.location == STANDARD_INPUT:
        raise ValueError("standard input must be copied to a file first (stdin_copy.py)")
    try:
        if not path.is_dir():
            path.stat()
            if not path.is_file():
                raise ConfigError("The data are neither a file nor a folder.", where=where, expected="a file or folder")
            return FoundFiles((DataFile(source, path, source.name if source.name != source.text else path.name),))
        return _files_of_folder(source, path, where)
    except OSError as error:
        helps = how_to_find(path) if isinstance(error, FileNotFoundError) else f"ls -ld {shlex.quote(str(path))}"
        raise ConfigError(
            "The data cannot be read.",
            where=where,
            found=error.strerror,
            next_command=f"{helps}; a dataset on the hub is OWNER/NAME[@REVISION][:SPLIT]",
        ) from error


def _files_of_folder(source: DataSource, folder: Path, where: str) -> FoundFiles:
    if (folder / SAVED_DATASET).is_file():
        return FoundFiles((DataFile(source, folder, folder.name),))
    if (folder / SAVED_SPLITS).is_file():
        splits = sorted(each.name for each in folder.iterdir() if (each / SAVED_DATASET).is_file())
        split = source.split or chosen_split(splits, where, source.location)
        if split not in splits:
            raise _no_split(where, split, splits)
        others = ", ".join(each for each in splits if each != split)
        return FoundFiles(
            (DataFile(source, folder / split, split),), f"reads the split {split}, not {others}" if others else None
        )
    names, kept_out = _names_in(folder, where)
    if not names:
        raise ConfigError(
            "The folder holds no data.",
            where=where,
            expected="files that end in .jsonl, .json, .csv, .tsv, .parquet or .arrow, also compressed",
            found=", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "an empty folder",
        )
    return _of_split(source, folder, names, kept_out, where)


def _names_in(folder: Path, where: str) -> tuple[list[str], list[str]]:
    """Return the names of the files of data in a folder, and of what else it holds. Hidden names are passed over.

    Raises one ConfigError with everything that has the name of a file of data and cannot be read, and with the folders
    that cannot be listed: their examples would be missing in silence.
    """
    names: list[str] = []
    others: list[str] = []
    problems: list[str] = []

    def failed(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=failed):
        folders[:] = sorted(each for each in folders if not each.startswith((".", "_")))
        linked = [each for each in folders if Path(parent, each).is_symlink()]
        for each in [*linked, *(name for name in files if not name.startswith((".", "_")))]:
            path = Path(parent, each)
            name = str(path.relative_to(folder))
            if each in linked or not _DATA_SUFFIX.search(each):
                others.append(f"{name}/" if each in linked else name)
            elif path.is_file():
                names.append(name)
            else:
                found = "a link to a file that does not exist" if path.is_symlink() else "not a file"
                problems.append(f"{name}: {found}")
    if problems:
        raise ConfigError(
            "The folder holds data that cannot be read.",
            where=where,
            problems=shortened(sorted(problems)),
            next_command=f"remove them from {folder}, or repair them",
        )
    return sorted(names), sorted(others)


def _of_split(source: DataSource, folder: Path, names: list[str], others: list[str], where: str) -> FoundFiles:
    """Return the files of the source's split. Without one: all, or those of `train` if names tell splits apart."""
    splits = {name: split_of(name) for name in names}
    known = sorted({split for split in splits.values() if split is not None})
    split = source.split
    if split is None and len(known) > 1:
        split = chosen_split(known, where, source.location)
    taken = [name for name in names if split is None or splits[name] == split]
    if not taken:
        raise _no_split(where, str(split), known)
    left = [name for name in names if name not in taken]
    notes = [f"reads the split {split}; {_left_out(left)}"] if left else []
    notes += [f"holds names that are not of files of data; {_left_out(others)}"] if others else []
    note = ", and ".join(notes) or None
    return FoundFiles(tuple(DataFile(source, folder / name, escaped(name)) for name in taken), note)


def _left_out(names: list[str]) -> str:
    """Return how many files are left out, with the first names."""
    shown = ", ".join(map(escaped, names[:5])) + (", …" if len(names) > 5 else "")
    return f"{len(names):,} {'file is' if len(names) == 1 else 'files are'} left out: {shown}"


def split_of(name: str) -> str | None:
    """Return the split that the name of a file tells (`data/test-00000.parquet`), or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in _SPLITS.items() if any(word in names for word in words)), None)


def _no_split(where: str, split: str, splits: list[str]) -> ConfigError:
    return ConfigError(
        "There is no such split.", where=where, expected=f"one of {', '.join(splits) or 'no split'}", found=split
    )

"""Files of a source: a file, the files of a folder, a saved dataset, a dataset on the hub. All yield records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.data_sources import STANDARD_INPUT, DataSource
from mixtral_run.errors import ConfigError
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
    """One file of a source, a saved dataset, or a dataset on the hub. name: how errors name it among several."""

    source: DataSource
    path: Path | None
    name: str

    def records(self, where: str) -> Iterator[Record | BadRecord]:
        """Yield the records in their order. Raises ConfigError if the file is of no format that is read, or damaged."""
        if self.path is None:
            yield from hub_records(self.source, where)
        elif self.path.is_dir():
            yield from saved_records(self.path, where)
        else:
            yield from _records_of_file(self.path, where)


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
        raise ConfigError(
            "The data cannot be read.",
            where=where,
            found=error.strerror,
            next_command=f"ls -ld {path.parent}; a dataset on the hub is OWNER/NAME[@REVISION][:SPLIT]",
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
    names = sorted(
        str(each.relative_to(folder))
        for each in folder.rglob("*")
        if each.is_file() and _DATA_SUFFIX.search(each.name) and not _is_hidden(each.relative_to(folder))
    )
    if not names:
        raise ConfigError(
            "The folder holds no data.",
            where=where,
            expected="files that end in .jsonl, .json, .csv, .tsv, .parquet or .arrow, also compressed",
            found=", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "an empty folder",
        )
    return _of_split(source, folder, names, where)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _of_split(source: DataSource, folder: Path, names: list[str], where: str) -> FoundFiles:
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
    note = f"reads the split {split}; {len(left):,} files are left out: {', '.join(left[:5])}" if left else None
    return FoundFiles(tuple(DataFile(source, folder / name, name) for name in taken), note)


def split_of(name: str) -> str | None:
    """Return the split that the name of a file tells (`data/test-00000.parquet`), or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in _SPLITS.items() if any(word in names for word in words)), None)


def _no_split(where: str, split: str, splits: list[str]) -> ConfigError:
    return ConfigError(
        "There is no such split.", where=where, expected=f"one of {', '.join(splits) or 'no split'}", found=split
    )

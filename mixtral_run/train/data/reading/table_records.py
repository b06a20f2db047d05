"""Readers of Parquet, Arrow, saved datasets and datasets on the hub, through pyarrow and datasets, batch by batch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mixtral_run.config.data_sources import DataSource
from mixtral_run.config.names.hub_names import hub_name_and_revision
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.formats import ARROW_FILE, PARQUET, needs_pyarrow
from mixtral_run.train.data.reading.records import Record, refuse_same_names

_BATCH_ROWS = 256
"""Rows that are turned into Python objects at a time."""
SAVED_DATASET = "state.json"
SAVED_SPLITS = "dataset_dict.json"
"""Files that datasets' save_to_disk writes: one in the folder of a dataset, one in a folder of splits."""


def table_records(stream: IO[bytes], path: Path, name: str, where: str) -> Iterator[Record]:
    """Yield the rows of a Parquet file, of an Arrow file, or of an Arrow stream that `stream` reads."""
    with _translated(f"The {name}", where):
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet

        # An explicit reader: `pyarrow.parquet.read_table` would hold the whole file.
        if name == PARQUET:
            with pyarrow.parquet.ParquetFile(str(path), memory_map=True) as file:
                refuse_same_names(file.schema_arrow.names, where)
                yield from _rows(file.iter_batches(_BATCH_ROWS))
        elif name == ARROW_FILE:
            with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as reader:
                refuse_same_names(reader.schema.names, where)
                yield from _rows(reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            with pyarrow.ipc.open_stream(stream) as reader:
                refuse_same_names(reader.schema.names, where)
                yield from _rows(reader)


def saved_records(folder: Path, where: str) -> Iterator[Record]:
    """Yield the rows of a dataset that save_to_disk wrote."""
    with _translated("The saved dataset", where):
        import datasets

        yield from _rows_of_dataset(datasets.load_from_disk(str(folder)))


def hub_records(source: DataSource, where: str) -> Iterator[Record]:
    """Yield the rows of one split of a dataset on the hub. It is downloaded into HF_HOME at the first call."""
    name, revision = hub_name_and_revision(source.location)
    with _translated(f"The dataset {source.location} on the hub", where, _HUB_HELP):
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        split = source.split or _split_of(name, revision, source, where)
        yield from _rows_of_dataset(datasets.load_dataset(name, source.subset, revision=revision, split=split))


def hub_files(source: DataSource, where: str) -> tuple[list[Path], str]:
    """Return the Arrow files of a dataset on the hub in HF_HOME, and which of their rows are its split."""
    name, revision = hub_name_and_revision(source.location)
    with _translated(f"The dataset {source.location} on the hub", where, _HUB_HELP):
        import datasets

        datasets.disable_progress_bars()
        split = source.split or _split_of(name, revision, source, where)
        dataset = datasets.load_dataset(name, source.subset, revision=revision, split=split)
        return [Path(each["filename"]) for each in dataset.cache_files], f"{split}, {len(dataset)} rows"


_HUB_HELP = (
    "there is no file or folder of that name here; for a dataset on the hub check name, subset, split "
    "and revision; HF_ENDPOINT, HTTPS_PROXY and HF_HUB_OFFLINE; for a dataset that is gated "
    "or private, hf auth login or HF_TOKEN in the environment"
)


def _split_of(name: str, revision: str | None, source: DataSource, where: str) -> str:
    import datasets

    splits = datasets.get_dataset_split_names(name, source.subset, revision=revision)
    return chosen_split(splits, where, source.location)


def chosen_split(splits: list[str], where: str, location: str) -> str:
    """Return the split to read if none is named: `train`, or the only one. Raises ConfigError for others."""
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise ConfigError(
        "The dataset has several splits, none of which is 'train'.",
        where=where,
        expected=f"{location}:SPLIT",
        found=", ".join(splits)[:200] or "no split",
    )


def _rows_of_dataset(dataset: Any) -> Iterator[Record]:
    return _rows(
        batch for table in dataset.with_format("arrow").iter(_BATCH_ROWS) for batch in table.to_batches(_BATCH_ROWS)
    )


def _rows(batches: Iterable[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(begin, _BATCH_ROWS).to_pylist():
                number += 1
                yield Record(f"row {number:,}", without_nulls(row))


def without_nulls(value: Any) -> Any:
    """Return a value without the keys of structures that are null: a table has every key in every row."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


@contextmanager
def _translated(what: str, where: str, next_command: str | None = None) -> Iterator[None]:
    """Turn what pyarrow and datasets raise into ConfigError."""
    try:
        yield
    except (ConfigError, GeneratorExit):
        raise
    except ImportError as error:
        raise needs_pyarrow(what, where) from error
    except Exception as error:
        # pyarrow, datasets, huggingface_hub and its HTTP library raise errors of many classes without a common base.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{what} cannot be read.",
            where=where,
            found=f"{type(error).__name__}: {lines[0] if lines else ''}"[:300],
            next_command=next_command,
        ) from error

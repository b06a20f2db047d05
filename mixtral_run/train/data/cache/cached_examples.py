"""The examples of a setting as a token cache: found by the content of its files, or read and tokenized into it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.config.data_sources import DataSource, content_sha256
from mixtral_run.config.verbs.training import RunConfig, TrainingConfig
from mixtral_run.errors import ConfigError, MixtralRunError, joined
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache.cache_folder import CacheFolder, default_folder
from mixtral_run.train.data.cache.content_hash import file_sha256, refuse_changed
from mixtral_run.train.data.cache.token_cache import CacheWriter, TokenCache
from mixtral_run.train.data.cache.tokenize import Numbered, TokenizingProgress, tokenized
from mixtral_run.train.data.reading.data_files import DataFile, files_of
from mixtral_run.train.data.reading.examples import ExampleStream, ReadOptions, read_examples, where_of
from mixtral_run.train.data.reading.table_records import hub_files
from mixtral_run.train.data.templates.encoding import Encoding
from mixtral_run.train.data.templates.prompt import check_token_ids, load_tokenizer
from mixtral_run.weights.manifest.describe import BaseDescription

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LINE_SUFFIXES = (".jsonl", ".ndjson")
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, eq=False)
class CachedExamples:
    """The examples of --data-path or --valid-data-path as token ids.

    Attributes:
        cache: their token cache.
        where: the flag and its sources, for errors.
        sources: as the command line names them.
        counts: examples of each source, which follow each other in the cache.
        remarks: what the reading reported.
        padding_id: id that fills rows.
        sha256: of the content, as the manifest of an adapter has it; None for a dataset on the hub.
        chat_template: as the manifest of an adapter has it.
        rows_each: rows of the cache for each example: of preferences two, one for each answer.
    """

    cache: TokenCache
    where: str
    sources: tuple[DataSource, ...]
    counts: tuple[int, ...]
    remarks: tuple[str, ...]
    padding_id: int
    sha256: str | None
    chat_template: Mapping[str, Any]
    rows_each: int = 1

    @property
    def digests(self) -> NDArray[np.uint64]:
        """Return a hash of each example's content."""
        return self.cache.arrays.digests[:: self.rows_each]


class ExampleCaches:
    """Opens the token caches of a run; makes those that are missing.

    Args:
        config: of the run.
        base: its tokenizer encodes.
        report: shows the progress.
        verify: compare existing caches with their checksums.
    """

    def __init__(self, config: TrainingConfig, base: BaseDescription, report: Report, *, verify: bool) -> None:
        self._base, self._report, self._verify = base, report, verify
        self._options = ReadOptions.of(config)
        self._encoding = Encoding(base.tokenizer, config.chat_template)
        save = config.save if isinstance(config, RunConfig) else None
        self._folder = CacheFolder(
            # Messages name it, without `..` and links.
            (config.data_cache or default_folder(save)).resolve(),
            int(config.data_cache_gib * 2**30),
            60.0 * config.distributed_timeout_minutes,
        )

    def open(self, texts: Sequence[str], setting: str) -> CachedExamples:
        """Return the examples of the sources of one setting.

        Raises:
            MixtralRunError: the data cannot be read, examples cannot be used, or ids are not in the vocabulary.
        """
        stream = read_examples(texts, self._options, setting)
        files = self._hashed(stream.sources, setting)
        key: dict[str, Any] = {
            "sources": [file.key for file in files],
            "encoding": self._encoding.fingerprint(),
            "options": [self._options.data_format, dict(self._options.fields), self._options.skip_bad_examples],
        }
        if self._options.preferences is not None:
            key["preferences"] = self._options.preferences
        cache = self._folder.open_or_make(key, self._make(stream, files), self._report, verify=self._verify)
        self._check_ids(cache, stream.where)
        notes = cache.notes
        return CachedExamples(
            cache,
            stream.where,
            stream.sources,
            tuple(int(count) for count in notes["counts"]),
            (*self._left_out(stream.sources, setting), *map(str, notes["remarks"])),
            int(notes["padding_id"]),
            content_sha256(texts, self._sha256),
            notes["chat_template"],
            1 if self._options.preferences is None else 2,
        )

    def _left_out(self, sources: Sequence[DataSource], setting: str) -> list[str]:
        """Return lines about the files of folders that are not read; a cache does not depend on them."""
        notes = ((source, files_of(source, where_of(setting, source.name)).left_out) for source in sources)
        return [f"{source.name} {note}." for source, note in notes if note]

    def _sha256(self, path: Path) -> str:
        return file_sha256(path, self._folder.path if self._folder.path.is_dir() else None)

    def _hashed(self, sources: Sequence[DataSource], setting: str) -> list[_Hashed]:
        """Return the files of the sources with their hashes. Raises one error with all that cannot be read."""
        found: list[_Hashed] = []
        errors: list[MixtralRunError] = []
        for number, source in enumerate(sources):
            where = where_of(setting, source.name)
            try:
                files = files_of(source, where).files
                found += [self._hashed_file(number, file, len(files) + len(sources) > 2, where) for file in files]
            except MixtralRunError as error:
                errors.append(error)
            except OSError as error:
                errors.append(ConfigError("The data cannot be read.", where=where, found=error.strerror))
        if errors:
            raise joined(errors)
        return found

    def _hashed_file(self, number: int, file: DataFile, several: bool, where: str) -> _Hashed:
        rows = ""
        if file.path is None:
            paths, rows = hub_files(file.source, where)
        elif file.path.is_dir():
            paths = sorted(each for each in file.path.rglob("*") if each.is_file())
        else:
            paths = [file.path]
        # Errors name a file among several. Alone only its suffixes matter, which decide about its format.
        name = file.name if several else "".join(Path(file.name).suffixes)
        hashes = {path: self._sha256(path) for path in paths}
        return _Hashed([number, name, rows, *hashes.values()], hashes)

    def _check_ids(self, cache: TokenCache, where: str) -> None:
        """Raise WeightsError if the model has no row for a token id."""
        size = self._base.architecture.vocab_size
        if max(int(cache.notes["tokenizer_size"]), cache.arrays.highest_id + 1) > size:
            tokenizer = load_tokenizer(self._base.tokenizer)
            check_token_ids(tokenizer, cache.arrays.highest_id, size, self._base.tokenizer, where)

    def _make(
        self, stream: ExampleStream, files: Sequence[_Hashed]
    ) -> Callable[[CacheWriter, Callable[[str], None]], Mapping[str, Any]]:
        def make(writer: CacheWriter, note: Callable[[str], None]) -> Mapping[str, Any]:
            with self._report.activity("tokenizing") as row:
                progress = TokenizingProgress(_about(files), self._report.say, note, row)
                for chunk in tokenized(_numbered(stream), self._encoding, progress.advance):
                    writer.add(chunk.encoded, chunk.digests, chunk.places)
                    for source, place, problem in chunk.problems:
                        stream.refuse(source, place, problem)
            stream.raise_problems()
            progress.finish()
            for file in files:
                for path, sha256 in file.hashes.items():
                    refuse_changed(path, sha256)
            return {
                "counts": stream.counts_by_source,
                "remarks": stream.remarks_on_content(),
                **self._encoding.facts(),
            }

        return make


@dataclass(frozen=True)
class _Hashed:
    """A file of a source. key: of the cache, as JSON values. hashes: SHA-256 of the files that it consists of."""

    key: list[Any]
    hashes: Mapping[Path, str]


def _numbered(stream: ExampleStream) -> Iterator[Numbered]:
    """Yield the examples with the number of each one's source.

    Once one is bad and is not left out, the others are only read: the run will not start.
    """
    for source, example in stream.numbered():
        if stream.problems.num_examples and not stream.options.skip_bad_examples:
            continue
        yield source, example


def _about(files: Sequence[_Hashed]) -> int | None:
    """Return the number of lines of the files if there is one example in each line, else None."""
    paths = [path for file in files for path in file.hashes]
    if not all(path.name.endswith(LINE_SUFFIXES) for path in paths):
        return None
    lines = 0
    # A file that is not there any more is reported where its content is read.
    with contextlib.suppress(OSError):
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    lines += block.count(b"\n")
    return lines

"""The samples of a training run: the examples of a file or mock data, and the validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mixtral_run.config.training import FinetuneConfig, TrainingConfig
from mixtral_run.errors import ConfigError, MixtralRunError, TrainingError, joined
from mixtral_run.report import Report
from mixtral_run.train.data.cache_folder import CacheFolder, default_folder
from mixtral_run.train.data.content_hash import file_sha256, refuse_changed
from mixtral_run.train.data.encoding import Encoding
from mixtral_run.train.data.examples import DATA_SETTINGS, read_example_file, where_of
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.prompt import check_token_ids, load_tokenizer
from mixtral_run.train.data.samples import MockSamples, Samples, SampleSource
from mixtral_run.train.data.split import split_by_digest
from mixtral_run.train.data.token_cache import CacheWriter, TokenCache
from mixtral_run.train.data.tokenize import TokenizingProgress, tokenized
from mixtral_run.weights.manifest.describe import BaseDescription

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FileSamples = Samples | PackedSamples


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Samples of a run.

    Attributes:
        samples: to train on.
        validation: to evaluate, if there are any.
        sha256: of --data-path; None for mock data.
        identity: a hash of all token ids, which every rank must agree on.
        warnings: what the reading of the files reported.
    """

    samples: SampleSource
    validation: FileSamples | None = None
    sha256: str | None = None
    identity: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int | None:
        """Number of samples of an epoch; None for mock data, which have no end."""
        return None if isinstance(self.samples, MockSamples) else len(self.samples)  # type: ignore[arg-type]

    def describe(self, config: TrainingConfig, report: Report) -> None:
        """Print a line about the samples of the run, and one about the validation set. config: with its iterations."""
        for warning in self.warnings:
            report.warn(warning)
        report.say(f"Data: {self.samples.describe()}")
        if self.num_samples is not None:
            epochs = config.iterations * config.global_batch_size / self.num_samples
            report.say(f"  {config.iterations:,} iterations of {config.global_batch_size:,} are {epochs:,.1f} epochs")
        if self.validation is not None:
            report.say(f"Validation set: {self.validation.describe()}")


def open_data(config: TrainingConfig, base: BaseDescription, report: Report, *, verify: bool = False) -> TrainingData:
    """Return the samples of a run. Data that are not in the token cache yet are tokenized into it.

    Args:
        config: of the run.
        base: its tokenizer is used.
        report: shows the progress of the tokenization.
        verify: compare an existing cache with its checksums.

    Raises:
        MixtralRunError: one error with all unusable examples of all files.
    """
    files = {name: path for name in DATA_SETTINGS if (path := getattr(config, name, None)) is not None}
    if not files:
        return TrainingData(MockSamples(base.architecture.vocab_size, config.seq_length, config.seed))
    opened: dict[str, _OpenFile] = {}
    errors: list[MixtralRunError] = []
    reader = _Reader(config, base, report, verify)
    for name, path in files.items():
        try:
            opened[name] = reader.open(path, name)
        except MixtralRunError as error:
            errors.append(error)
    if not errors:
        try:
            return _training_data(config, base, opened, reader.padding_id)
        except MixtralRunError as error:
            errors.append(error)
    raise joined(errors)


def open_data_everywhere(config: TrainingConfig, base: BaseDescription, report: Report) -> TrainingData:
    """Return `open_data` on every rank, after a check that all have the same. All ranks must call.

    Raises the error of any rank on all of them, and TrainingError if the tokens differ between ranks.
    """
    mine: TrainingData | None = None
    outcome: MixtralRunError | str
    try:
        mine = open_data(config, base, report)
        outcome = mine.identity
    except MixtralRunError as error:
        outcome = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for each in outcomes:
        if isinstance(each, MixtralRunError):
            raise each
    check_same(outcomes)
    assert mine is not None
    return mine


def check_same(identities: list[str]) -> None:
    """Raise TrainingError unless all ranks have the same tokens."""
    by_identity: dict[str, list[int]] = {}
    for rank, identity in enumerate(identities):
        by_identity.setdefault(identity, []).append(rank)
    if len(by_identity) > 1:
        raise TrainingError(
            "The processes do not have the same data.",
            problems=[
                f"ranks {', '.join(map(str, ranks[:8]))}{', …' * (len(ranks) > 8)}: tokens {identity}"
                for identity, ranks in by_identity.items()
            ],
            expected="the same files, and the same tokenizer with the base, on every host",
            next_command="sha256sum of the data files and of the tokenizer's on each host",
        )


@dataclass(frozen=True, eq=False)
class _OpenFile:
    cache: TokenCache
    sha256: str
    where: str


class _Reader:
    """Opens the token caches of a run's data files; makes them if they are missing."""

    def __init__(self, config: TrainingConfig, base: BaseDescription, report: Report, verify: bool) -> None:
        self._base, self._report, self._verify = base, report, verify
        self._encoding = Encoding(base.tokenizer)
        self._tokenizer = load_tokenizer(base.tokenizer)
        self.padding_id = int(self._tokenizer.eos_token_id)
        save = config.save if isinstance(config, FinetuneConfig) else None
        self._folder = CacheFolder(
            config.data_cache or default_folder(save),
            int(config.data_cache_gib * 2**30),
            60.0 * config.distributed_timeout_minutes,
        )

    def open(self, path: Path, setting: str) -> _OpenFile:
        """Return the cache of a file."""
        where = where_of(setting, path)
        try:
            sha256 = file_sha256(path, self._folder.path if self._folder.path.is_dir() else None)
        except OSError as error:
            raise ConfigError("The data cannot be read.", where=where, found=error.strerror) from error
        key = {"content": sha256, "encoding": self._encoding.fingerprint()}
        make = self._make(path, setting, sha256)
        cache = self._folder.open_or_make(key, make, self._report, verify=self._verify)
        check_token_ids(
            self._tokenizer, cache.arrays.highest_id, self._base.architecture.vocab_size, self._base.tokenizer, where
        )
        return _OpenFile(cache, sha256, where)

    def _make(
        self, path: Path, setting: str, sha256: str
    ) -> Callable[[CacheWriter, Callable[[str], None]], Mapping[str, Any]]:
        def make(writer: CacheWriter, note: Callable[[str], None]) -> Mapping[str, Any]:
            file = read_example_file(path, setting)
            progress = TokenizingProgress(len(file.examples), self._report.say, note)
            for chunk in tokenized(file.examples, self._encoding, progress.advance):
                writer.add(chunk.encoded, chunk.digests, chunk.places)
            progress.finish()
            refuse_changed(path, sha256)
            unused = file.describe_unused()
            return {"warnings": [] if unused is None else [unused]}

        return make


def _training_data(
    config: TrainingConfig, base: BaseDescription, opened: Mapping[str, _OpenFile], padding_id: int
) -> TrainingData:
    mock = MockSamples(base.architecture.vocab_size, config.seq_length, config.seed)
    parts: dict[str, Samples] = {}
    errors: list[MixtralRunError] = []
    fraction = config.valid_fraction if isinstance(config, FinetuneConfig) else 0.0
    for name, file in opened.items():
        chosen: dict[str, NDArray[np.int64] | None] = {name: None}
        try:
            if name == "data_path" and fraction:
                training, validation = split_by_digest(file.cache.arrays.digests, fraction, file.where)
                chosen = {"data_path": training, "valid_data_path": validation}
            for part, numbers in chosen.items():
                parts[part] = Samples(file.cache.arrays, config.seq_length, padding_id, file.where, numbers)
        except MixtralRunError as error:
            errors.append(error)
    if errors:
        raise joined(errors)
    packs = isinstance(config, FinetuneConfig) and config.pack
    ready: dict[str, FileSamples] = {name: PackedSamples(each) if packs else each for name, each in parts.items()}
    return TrainingData(
        ready.get("data_path", mock),
        ready.get("valid_data_path"),
        opened["data_path"].sha256 if "data_path" in opened else None,
        " ".join(file.cache.identity for file in opened.values()),
        tuple(f"{file.where}: {each}" for file in opened.values() for each in file.cache.notes.get("warnings", ())),
    )

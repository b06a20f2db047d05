"""The samples of a training run: examples of data files or mock data, and the validation set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from mixtral_run.config.data import DATA_SETTINGS, KTO
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.training import RunConfig, TrainingConfig
from mixtral_run.errors import ConfigError, MixtralRunError, TrainingError, joined
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache.cached_examples import CachedExamples, ExampleCaches
from mixtral_run.train.data.mixture import describe_mixture, mixed_indices
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.preferences import FileSamples, PreferenceSamples, fitting
from mixtral_run.train.data.reading.examples import counted
from mixtral_run.train.data.samples import AnySource, MockSamples, Samples, has_response
from mixtral_run.train.data.split import split_by_digest
from mixtral_run.weights.manifest.describe import BaseDescription
from mixtral_run.weights.manifest.template_record import TemplateRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRAINING, VALIDATION = DATA_SETTINGS


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Samples of a run.

    Attributes:
        samples: to train on.
        validation: to evaluate, if there are any.
        sha256: of the content of --data-path; None for mock data and for a dataset on the hub.
        chat_template: what a manifest says about it; None for mock data, which have no messages.
        identity: a hash of all token ids, which every rank must agree on.
        remarks: what the reading of the data reported.
    """

    samples: AnySource
    validation: FileSamples | None = None
    sha256: str | None = None
    chat_template: Mapping[str, Any] | None = None
    identity: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int | None:
        """Number of samples of an epoch; None for mock data, which have no end."""
        return None if isinstance(self.samples, MockSamples) else len(self.samples)  # type: ignore[arg-type]

    def describe(self, config: TrainingConfig, report: Report) -> None:
        """Print a line each about the chat template, the samples of the run, and the validation set.

        config: with its iterations.
        """
        for remark in self.remarks:
            report.warn(remark)
        template = TemplateRecord.parse(self.chat_template)
        if template is not None:
            report.say(f"Chat template: {template.describe()}")
        report.say(f"Data: {self.samples.describe()}")
        if self.num_samples is not None:
            epochs = config.iterations * config.global_batch_size / self.num_samples
            of_batches = f"{counted(config.iterations, 'iteration')} of {config.global_batch_size:,}"
            report.say(f"  {of_batches} {'is' if config.iterations == 1 else 'are'} {epochs:,.1f} epochs")
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
    settings = {name: texts for name in DATA_SETTINGS if (texts := getattr(config, name, ()))}
    opened: dict[str, CachedExamples] = {}
    errors: list[MixtralRunError] = []
    caches = ExampleCaches(config, base, report, verify=verify) if settings else None
    for name, texts in settings.items():
        assert caches is not None
        try:
            opened[name] = caches.open(texts, name)
        except MixtralRunError as error:
            errors.append(error)
    try:
        data = _training_data(config, base, opened)
    except MixtralRunError as error:
        errors.append(error)
    if errors:
        raise joined(errors)
    return data


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


def _training_data(config: TrainingConfig, base: BaseDescription, opened: Mapping[str, CachedExamples]) -> TrainingData:
    """Return the samples of opened caches. Raises one error with all problems of all of them."""
    parts: dict[str, FileSamples] = {}
    remarks = [f"{each.where}: {remark}" for each in opened.values() for remark in each.remarks]
    errors: list[MixtralRunError] = []
    for setting, examples in opened.items():
        try:
            for name, chosen in _parts(config, setting, examples, remarks).items():
                parts[name] = _samples(config, examples, chosen)
        except MixtralRunError as error:
            errors.append(error)
    if errors:
        raise joined(errors)
    if overlap := _overlap(opened):
        remarks.append(overlap)
    for setting, each in parts.items():
        if isinstance(each, PreferenceSamples):
            remarks += [f"--{setting.replace('_', '-')}: {remark}" for remark in each.remarks()]
    mock = MockSamples(base.architecture.vocab_size, config.seq_length, config.seed)
    return TrainingData(
        parts.get(TRAINING, mock),
        parts.get(VALIDATION),
        opened[TRAINING].sha256 if TRAINING in opened else None,
        opened[TRAINING].chat_template if TRAINING in opened else None,
        " ".join(examples.cache.identity for examples in opened.values()),
        tuple(remarks),
    )


def _samples(config: TrainingConfig, examples: CachedExamples, chosen: NDArray[np.int64] | None) -> FileSamples:
    """Return the examples as samples of the run. chosen: numbers of the examples; None: all."""
    arrays, padding_id, where = examples.cache.arrays, examples.padding_id, examples.where
    if isinstance(config, AlignConfig):
        return PreferenceSamples(
            arrays, config.seq_length, padding_id, where, chosen,
            paired=config.method != KTO, packs=config.pack, folder=examples.cache.folder,
            row_multiple=config.tensor_model_parallel_size or 1,
        )  # fmt: skip
    samples = Samples(arrays, config.seq_length, padding_id, where, chosen)
    return PackedSamples(samples) if isinstance(config, RunConfig) and config.pack else samples


def _overlap(opened: Mapping[str, CachedExamples]) -> str | None:
    """Return a line about examples of the validation set that are trained on; None if there are none."""
    if len(opened) < 2:
        return None
    training, validation = (opened[name].digests for name in (TRAINING, VALIDATION))
    count = int(np.isin(validation, training).sum())
    if not count:
        return None
    return (
        f"{opened[VALIDATION].where}: {count:,} of {len(validation):,} examples are in the training data as well; "
        "their loss does not show how the model does on new data."
    )


def _parts(
    config: TrainingConfig, setting: str, examples: CachedExamples, remarks: list[str]
) -> dict[str, NDArray[np.int64] | None]:
    """Return the examples for training, for validation or for both. None: all of them. Remarks are added."""
    arrays = examples.cache.arrays
    usable: NDArray[np.int64] | None = None
    if config.skip_bad_examples:
        keep, too_long = has_response(arrays, config.seq_length), " before {} response begins"
        if isinstance(config, AlignConfig):
            keep, too_long = fitting(arrays, config.seq_length, together=config.pack and config.method != KTO), ""
        if not keep.all():
            usable = np.flatnonzero(keep)
            if not len(usable):
                all_of_them = "the only one is" if len(keep) == 1 else f"all {len(keep):,} are"
                raise ConfigError(
                    f"No example is left: {all_of_them} longer than --seq-length {config.seq_length:,}"
                    f"{too_long.format('its' if len(keep) == 1 else 'their')}.",
                    where=examples.where,
                    next_command="a larger --seq-length; mixtral-run data check counts how many examples fit",
                )
            num_left = len(keep) - len(usable)
            verb, their = ("is", "its") if num_left == 1 else ("are", "their")
            remarks.append(
                f"{examples.where}: {counted(num_left, 'example')} {verb} longer than --seq-length "
                f"{config.seq_length:,}{too_long.format(their)}, and {verb} left out."
            )
    found = {setting: usable}
    if setting == TRAINING and isinstance(config, RunConfig) and config.valid_fraction:
        digests = examples.digests
        chosen = np.arange(len(digests)) if usable is None else usable
        training, validation = split_by_digest(digests[chosen], config.valid_fraction, examples.where)
        found = {TRAINING: chosen[training], VALIDATION: chosen[validation]}
    if setting == TRAINING:
        found[TRAINING] = _mixed(examples, found[TRAINING], remarks)
    return found


def _mixed(examples: CachedExamples, chosen: NDArray[np.int64] | None, remarks: list[str]) -> NDArray[np.int64] | None:
    """Return the examples of an epoch, repeated as the weights of the sources demand."""
    weights = [source.weight for source in examples.sources]
    counts = list(examples.counts)
    if chosen is not None:
        counts = np.diff(np.searchsorted(chosen, np.cumsum([0, *examples.counts]))).tolist()
    indices = mixed_indices(counts, weights)
    if indices is None:
        return chosen
    described = describe_mixture([source.name for source in examples.sources], counts, weights)
    remarks += [described] if described else []
    return indices if chosen is None else chosen[indices]

"""The samples of a training run: the examples of a file or mock data, and the validation set."""

from __future__ import annotations

from collections.abc import Mapping

from mixtral_run.config.data import DATA_SETTINGS
from mixtral_run.config.training import FinetuneConfig, TrainingConfig
from mixtral_run.errors import MixtralRunError, joined
from mixtral_run.report import Report
from mixtral_run.train.data.examples import ReadOptions, read_examples
from mixtral_run.train.data.mixture import describe_mixture, mixed_indices
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.prompt import check_token_ids, load_tokenizer
from mixtral_run.train.data.samples import MockSamples, Samples, SampleSource
from mixtral_run.weights.manifest.describe import BaseDescription

FileSamples = Samples | PackedSamples


def open_samples(
    config: TrainingConfig, base: BaseDescription, report: Report
) -> tuple[SampleSource, FileSamples | None]:
    """Return the training samples and those of --valid-data-path, and print a line about each.

    Raises one error with all unusable examples of both files.
    """
    files = {name: texts for name in DATA_SETTINGS if (texts := getattr(config, name, ()))}
    found = _open_files(config, base, files, report) if files else {}
    samples = found.get("data_path", MockSamples(base.architecture.vocab_size, config.seq_length, config.seed))
    validation_samples = found.get("valid_data_path")
    report.say(f"Data: {samples.describe()}")
    if "data_path" in found:
        epochs = config.train_iters * config.global_batch_size / len(found["data_path"])
        report.say(f"  {config.train_iters:,} iterations of {config.global_batch_size:,} are {epochs:,.1f} epochs")
    if validation_samples is not None:
        report.say(f"Validation set: {validation_samples.describe()}")
    return samples, validation_samples


def _open_files(
    config: TrainingConfig, base: BaseDescription, files: Mapping[str, tuple[str, ...]], report: Report
) -> dict[str, FileSamples]:
    tokenizer = load_tokenizer(base.tokenizer)
    found: dict[str, FileSamples] = {}
    errors: list[MixtralRunError] = []
    for name, texts in files.items():
        stream = read_examples(texts, ReadOptions.of(config), name)
        try:
            examples = list(stream)
            weights = [source.weight for source in stream.sources]
            if shares := mixed_indices(stream.counts_by_source, weights):
                examples = [examples[index] for index in shares]
                texts = tuple(source.location for source in stream.sources)
                report.say(describe_mixture(texts, stream.counts_by_source, weights) or "")
            samples = Samples(examples, tokenizer, config.seq_length, stream.where)
            check_token_ids(tokenizer, samples.highest_id, base.architecture.vocab_size, base.tokenizer, stream.where)
        except MixtralRunError as error:
            errors.append(error)
            continue
        for remark in stream.remarks():
            report.warn(f"{stream.where}: {remark}")
        found[name] = PackedSamples(samples) if isinstance(config, FinetuneConfig) and config.pack else samples
    if errors:
        raise joined(errors)
    return found

"""What `align` adds to a training run: its objective, and the log-probabilities of the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.train.checkpoints.checkpoint import load_adapter
from mixtral_run.train.checkpoints.init_adapter import describe_init_adapter
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.preferences.objective import PreferenceObjective
from mixtral_run.train.preferences.passes import training_passes
from mixtral_run.train.preferences.reference import add_references
from mixtral_run.train.run import Run
from mixtral_run.train.run_checkpoints import changed_reference
from mixtral_run.train.steps.objective import NextToken, Objective
from mixtral_run.train.validation import rows_of_all_ranks
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription


def objective_of(config: FinetuneConfig) -> Objective:
    """Return what the run minimizes."""
    return PreferenceObjective(config) if isinstance(config, AlignConfig) else NextToken()


def prepare_references(run: Run, config: FinetuneConfig, base: BaseDescription) -> None:
    """Compute the reference's log-probabilities of the samples to come, if the method needs them. All ranks must call.

    base: with its complete fingerprint. Does nothing for other methods and verbs.
    """
    if not isinstance(config, AlignConfig) or not config.has_reference:
        return
    samples, validation = run.data.samples, run.data.validation
    assert isinstance(samples, PreferenceSamples), "align trains on preferences"
    passes = training_passes(samples, config, run.start, run.mesh.data_size)
    fingerprint, as_reference = base.fingerprint, partial(without_adapters, run.model)
    if config.compares_with_adapter:
        adapter = describe_init_adapter(config, base)
        fingerprint += f" {_hash_of(adapter.folder)}" if run.mesh.is_first else ""
        as_reference = partial(_with_adapter, run.model, adapter)
    why = changed_reference(run, config)
    add_references(config, fingerprint, as_reference, run.model, samples, passes, run.report, why)
    if validation is not None:
        assert isinstance(validation, PreferenceSamples)
        whole = rows_of_all_ranks(len(validation), config.micro_batch_size, run.mesh.data_size)
        add_references(config, fingerprint, as_reference, run.model, validation, whole, run.report, why)
    run.meter.restart()


@contextmanager
def _with_adapter(model: MixtralModel, adapter: AdapterDescription) -> Iterator[None]:
    """Give the model another adapter within the block. All ranks must call."""
    own = [
        (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or is_adapter(name)  # also the frozen start of an adapter
    ]
    load_adapter(model, adapter)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in own:
                parameter.copy_(value)


def _hash_of(folder: Path) -> str:
    """Return a hash of the files of an adapter."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()

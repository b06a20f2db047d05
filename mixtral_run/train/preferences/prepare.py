"""What `align` adds to a training run: its objective, and the log-probabilities of the reference."""

from __future__ import annotations

import numpy as np

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.preferences.objective import PreferenceObjective
from mixtral_run.train.preferences.reference import add_references
from mixtral_run.train.run import Run
from mixtral_run.train.steps.objective import NextToken, Objective


def objective_of(config: FinetuneConfig) -> Objective:
    """Return what the run minimizes."""
    return PreferenceObjective(config) if isinstance(config, AlignConfig) else NextToken()


def prepare_references(run: Run, config: FinetuneConfig, fingerprint: str) -> None:
    """Compute the reference's log-probabilities of the samples to come, if the method needs them. All ranks must call.

    fingerprint: of the base. Does nothing for other methods and verbs.
    """
    if not isinstance(config, AlignConfig) or not config.has_reference:
        return
    samples, validation = run.data.samples, run.data.validation
    assert isinstance(samples, PreferenceSamples), "align trains on preferences"
    positions = range(run.start * config.global_batch_size, config.iterations * config.global_batch_size)
    needed = np.unique(np.fromiter((samples.index_of(each, config.seed) for each in positions), np.int64))
    add_references(config, fingerprint, run.model, samples, needed, run.report)
    if validation is not None:
        assert isinstance(validation, PreferenceSamples)
        add_references(config, fingerprint, run.model, validation, np.arange(len(validation)), run.report)
    run.meter.restart()

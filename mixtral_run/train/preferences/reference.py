"""Log-probabilities by the reference model, which is the trained model with its adapters off, or with those of
--init-adapter.

They are computed once, before the first iteration, for the samples that the run takes, in the passes in which training
sees them first, and stored in the token cache of the data: another run with the same base and data finds them there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from mixtral_run import __version__
from mixtral_run.config.data import KTO
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.launch.heartbeat import note_progress
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import sum_over
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.data.samples import MicroBatch
from mixtral_run.train.preferences.objective import log_probabilities
from mixtral_run.train.preferences.passes import ReferencePass, SamplesOfRanks, passes_with_new_samples
from mixtral_run.train.validation import evaluating
from mixtral_run.weights.io.files import sync_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
"""Version of the file."""
SAMPLES_BETWEEN_WRITES = 4096
"""Samples after which the values so far are written: a run that is killed continues from them."""


@dataclass(frozen=True)
class ReferenceFile:
    """The file of a reference's log-probabilities: float64 for each answer of a token cache, NaN if not known yet.

    With KTO, a second value for each prompt with another answer. A line of JSON describes it.
    """

    path: Path
    num_values: int

    @classmethod
    def of(
        cls, config: AlignConfig, fingerprint: str, model: MixtralModel, samples: PreferenceSamples
    ) -> ReferenceFile:
        """Return the file for the data and for everything that decides the values."""
        settings = model.settings
        key = [FORMAT, __version__, fingerprint, str(settings.dtype), settings.base_precision, config.pack]
        key += [settings.attention_precision] if settings.attention_precision != "bf16" else []
        # Rows of another form round differently, and mismatched answers are cut at the end of a row.
        key += [KTO, config.seq_length] if config.method == KTO else []
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return cls(samples.folder / f"reference-{name}.bin", len(samples.arrays) * (2 if config.method == KTO else 1))

    def read(self) -> NDArray[np.float64]:
        """Return the values; NaN for all of them if there is no file, or one that is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            head, _, data = self.path.read_bytes().partition(b"\n")
            if len(data) == 8 * self.num_values and json.loads(head)["crc32"] == zlib.crc32(data):
                return np.frombuffer(data, "<f8").astype(np.float64)
        return np.full(self.num_values, np.nan)

    def write(self, values: NDArray[np.float64]) -> None:
        """Replace the file, and keep what another run has added to it meanwhile. Raises OSError."""
        values = np.where(np.isnan(values), self.read(), values)
        data = values.astype("<f8").tobytes()
        head = json.dumps({"reference": FORMAT, "values": self.num_values, "crc32": zlib.crc32(data)}).encode()
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        partial.write_bytes(head + b"\n" + data)
        sync_path(partial)
        partial.rename(self.path)


def add_references(
    config: AlignConfig,
    fingerprint: str,
    as_reference: Callable[[], AbstractContextManager[None]],
    model: MixtralModel,
    samples: PreferenceSamples,
    passes: Iterable[SamplesOfRanks],
    report: Report,
    why: str | None = None,
) -> None:
    """Give samples the log-probabilities of their answers by the reference. All ranks must call.

    Args:
        config: of the run.
        fingerprint: of the reference; used in the first rank.
        as_reference: returns a context in which the model is the reference.
        model: of the run.
        samples: of the run; those in `passes` get their values.
        passes: the passes over samples that the run will make.
        report: gets lines about what is computed, and a progress bar.
        why: what makes this reference another one than that of the run so far; None if nothing does.
    """
    mesh = model.mesh
    file = ReferenceFile.of(config, fingerprint, model, samples)
    values = _from_first(file.read() if mesh.is_first else np.empty(file.num_values), model)
    size = len(samples.arrays)
    samples.reference = values[:size]
    samples.mismatched_reference = values[size:] if config.method == KTO else None
    known = ~np.isnan(values.reshape(-1, size).sum(axis=0))
    missing, num_samples = passes_with_new_samples(passes, samples, known)
    if not missing:
        report.say(f"Reference: the log-probabilities of {num_samples:,} samples are in {file.path}")
        return
    num_missing = sum(each.num_new for each in missing)
    report.say(
        f"Reference: computing the log-probabilities of {num_missing:,} samples "
        f"({num_samples - num_missing:,} are known)" + (f", because the reference is another one: {why}" if why else "")
    )
    between = max(1, SAMPLES_BETWEEN_WRITES // (config.micro_batch_size * mesh.data_size))
    with as_reference(), report.progress(num_missing, "reference", "samples") as progress:
        for begin in range(0, len(missing), between):
            _compute(model, samples, missing[begin : begin + between], values, progress.advance)
            if mesh.is_first:
                _write(file, values, report)


def _compute(
    model: MixtralModel,
    samples: PreferenceSamples,
    passes: Sequence[ReferencePass],
    values: NDArray[np.float64],
    advance: Callable[[int], None],
) -> None:
    """Fill in the values of the new samples of some passes by the model as it is. All ranks must call.

    Values that are known stay. advance: called with the number of samples that the ranks have computed.
    """
    mesh, size = model.mesh, len(samples.arrays)
    found = torch.zeros(2, len(values), dtype=torch.float64)
    with evaluating(model):
        for each in passes:
            chosen, is_new = each.samples[mesh.data_rank], each.is_new[mesh.data_rank]
            micro = samples.micro_batch(chosen)
            assert micro.answers is not None
            of_samples = [samples.entries_of(index or 0) for index in chosen]
            entries = np.asarray([entry for part in of_samples for entry in part], dtype=np.int64)
            new = np.repeat(is_new, [len(part) for part in of_samples])
            parts: list[tuple[MicroBatch, NDArray[np.int64]]] = [(micro, entries)]
            if samples.mismatched_reference is not None:
                parts.append((samples.mismatched(entries, micro.answers.counts), entries + size))
            for part, places in parts:
                logps = log_probabilities(model, part).cpu()
                found[:, places[new]] = torch.stack((logps[new], torch.ones(int(new.sum())).double()))
            note_progress()
            advance(each.num_new)
    sums, times = sum_over(found.to(mesh.device), mesh.data_group).cpu().numpy()
    computed = (times > 0) & np.isnan(values)
    # An answer that several ranks computed, as the data repeat it, has the mean of their values on all of them.
    values[computed] = sums[computed] / times[computed]


def _write(file: ReferenceFile, values: NDArray[np.float64], report: Report) -> None:
    try:
        file.write(values)
    except OSError as error:
        report.warn(
            f"The reference's log-probabilities cannot be stored in {file.path}, and are computed again by the next "
            f"run or --resume: {error.strerror}"
        )


def _from_first(values: NDArray[np.float64], model: MixtralModel) -> NDArray[np.float64]:
    """Return the first rank's values on every rank. All ranks must call."""
    if model.mesh.world_size == 1:
        return values
    shared = torch.from_numpy(values).to(model.mesh.device)
    dist.broadcast(shared, src=0)
    return shared.cpu().numpy()

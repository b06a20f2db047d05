"""The passes in which the reference computes: those of training, in their order, and those of an evaluation.

Products with other numbers of rows round differently, and near ties of a router are then decided the other way. In the
rows of training the model that training starts with and the reference have the same log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.train.data.preferences import PreferenceSamples

SamplesOfRanks = tuple[tuple[int | None, ...], ...]
"""The samples of a pass on each data-parallel rank. None: rows that only fill the pass."""


@dataclass(frozen=True)
class ReferencePass:
    """A pass of the reference. is_new: True for a sample whose values come from this pass."""

    samples: SamplesOfRanks
    is_new: tuple[tuple[bool, ...], ...]

    @property
    def num_new(self) -> int:
        """The number of samples whose values come from this pass."""
        return sum(map(sum, self.is_new))


def training_passes(
    samples: PreferenceSamples, config: AlignConfig, start: int, data_size: int
) -> Iterator[SamplesOfRanks]:
    """Yield the samples of each pass of training, as `batches` distributes them.

    Args:
        samples: of the run.
        config: of the run.
        start: finished iterations.
        data_size: data-parallel ranks.
    """
    size, part, micro = config.global_batch_size, config.global_batch_size // data_size, config.micro_batch_size
    for iteration in range(start, config.iterations):
        chosen = [samples.index_of(iteration * size + number, config.seed) for number in range(size)]
        for at in range(0, part, micro):
            yield tuple(tuple(chosen[first + at : first + at + micro]) for first in range(0, size, part))


def passes_with_new_samples(
    passes: Iterable[SamplesOfRanks], samples: PreferenceSamples, known: NDArray[np.bool_]
) -> tuple[list[ReferencePass], int]:
    """Return the passes that have samples with unknown values, and the number of different samples in all passes.

    A pass is computed as a whole. A sample is new in the first pass that has it, unless the data repeat its answers and
    another sample had them.

    Args:
        passes: all passes.
        samples: of the run.
        known: True for answers of the cache whose values are known.
    """
    found: list[ReferencePass] = []
    seen: set[int] = set()
    known = known.copy()

    def is_new(index: int | None) -> bool:
        if index is None:
            return False
        seen.add(index)
        entries = samples.entries_of(index)
        new = not known[entries].all()
        known[entries] = True
        return new

    for samples_of_ranks in passes:
        each = ReferencePass(samples_of_ranks, tuple(tuple(map(is_new, part)) for part in samples_of_ranks))
        if each.num_new:
            found.append(each)
    return found, len(seen)

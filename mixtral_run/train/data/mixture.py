"""Shares of several sources among the samples of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mixtral_run.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_SAMPLES = 200_000_000
"""Samples of the largest epoch: 1.6 GB of indices."""


def mixed_indices(counts: Sequence[int], weights: Sequence[float | None]) -> NDArray[np.int64] | None:
    """Return the examples of one epoch, as indices into the examples of all sources one after the other.

    The sources have the shares that the weights give them. Every example is there at least once. Examples of a source
    whose share is larger than its size are repeated, all of them equally often but for one time.

    Args:
        counts: examples of each source.
        weights: relative, as Megatron's --data-path takes them; None for every source if none was given.

    Returns:
        The indices, int64; None if there are no weights: then an epoch is every example once.
    """
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return None
    check_mixture(counts, weights)
    # The source that is largest for its share is taken once.
    total = max(count / share for count, share in zip(counts, shares, strict=True))
    found: list[NDArray[np.int64]] = []
    begin = 0
    for count, share in zip(counts, shares, strict=True):
        found.append(begin + np.arange(max(count, round(total * share)), dtype=np.int64) % count)
        begin += count
    return np.concatenate(found)


def check_mixture(counts: Sequence[int], weights: Sequence[float | None]) -> None:
    """Raise ConfigError if a weighted source has no example, or the weights are too far apart for an epoch."""
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return
    empty = [number + 1 for number, count in enumerate(counts) if not count]
    if empty:
        raise ConfigError(
            "A source of the data has a weight, and no example to train on.",
            where=f"the source number {empty[0]} of --data-path",
            expected="at least one example, which is neither left out nor in the validation set",
            next_command="mixtral-run data check, with that source alone",
        )
    total = sum(shares) * max(count / share for count, share in zip(counts, shares, strict=True))
    if total > MOST_SAMPLES:
        raise ConfigError(
            "The weights of the data are too far apart: an epoch takes every example at least once.",
            expected=f"an epoch of at most {MOST_SAMPLES:,} samples",
            found=f"{total:,.0f} samples from {sum(counts):,} examples",
            next_command="a larger weight for the largest source, or fewer examples in it",
        )


def describe_mixture(texts: Sequence[str], counts: Sequence[int], weights: Sequence[float | None]) -> str | None:
    """Return one line about how often each source is taken in an epoch; None without weights."""
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return None
    total = max(count / share for count, share in zip(counts, shares, strict=True))
    parts = [
        f"{text}: {count:,} example{'s' * (count != 1)}, "
        f"{share / sum(shares):.1%} of the samples, each {total * share / count:,.1f} times"
        for text, count, share in zip(texts, counts, shares, strict=True)
    ]
    return "An epoch takes " + "; ".join(parts)

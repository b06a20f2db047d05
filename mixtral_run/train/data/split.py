"""The part of the training data that is held back for validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mixtral_run.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def split_by_digest(
    digests: NDArray[np.uint64], fraction: float, where: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the examples for training, and of those for validation.

    The hash of an example's content alone decides. Therefore duplicates are on one side, and an example is on the same
    side whatever its file, its place in it and the other examples.

    Args:
        digests: of each example, evenly distributed over 64 bits.
        fraction: of the examples that are for validation, above 0 and below 1.
        where: the data, for errors.

    Raises:
        ConfigError: one of the two parts is empty.
    """
    held_back = digests < np.uint64(int(fraction * 2.0**64))
    training, validation = np.flatnonzero(~held_back), np.flatnonzero(held_back)
    if not len(training) or not len(validation):
        raise ConfigError(
            f"--valid-fraction {fraction:g} leaves no example for {'validation' if len(training) else 'training'}.",
            where=where,
            expected="examples on both sides",
            found=f"{len(training):,} for training, {len(validation):,} for validation",
            next_command=f"a {'larger' if len(training) else 'smaller'} --valid-fraction; or --valid-data-path",
        )
    return training, validation

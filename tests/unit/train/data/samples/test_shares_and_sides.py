"""Shares of sources and the side of an example, with numbers that are no whole multiples of each other."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.mixture import check_mixture, describe_mixture, mixed_indices
from mixtral_run.train.data.split import split_by_digest


def test_shares_that_are_no_whole_numbers() -> None:
    """Weights 2 and 4 of 3 and 4 examples: the first once and the second 1.5 times, 3 and 6 samples."""
    found = mixed_indices([3, 4], [2.0, 4.0])
    assert found is not None and found.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4] and found.dtype == np.int64
    assert describe_mixture(["a", "b"], [3, 4], [2.0, 4.0]) == (
        "An epoch takes a: 3 examples, 33.3% of the samples, each 1.0 times; b: 4 examples, 66.7% of the samples, "
        "each 1.5 times"
    )
    found = mixed_indices([4, 1, 2], [1, 0.5, 0.5])
    assert found is not None and found.tolist() == [0, 1, 2, 3, 4, 4, 5, 6]


def test_without_weights_there_is_no_mixture() -> None:
    assert mixed_indices([3, 4], [None, None]) is None and describe_mixture(["a", "b"], [3, 4], [None, None]) is None
    for counts in ([3, 0], [0, 3]):
        assert mixed_indices(counts, [None, None]) is None
    # Weights are given to all sources or to none; the settings refuse what is between.
    with pytest.raises(ValueError, match="zip"):
        mixed_indices([3, 4], [None, 1.0])


@pytest.mark.parametrize(("counts", "number"), [([0, 2, 0], 1), ([2, 0, 3], 2), ([4, 1, 0, 0], 3), ([1, 1, 1, 0], 4)])
def test_the_first_source_without_an_example_is_named(counts: list[int], number: int) -> None:
    with pytest.raises(ConfigError) as caught:
        mixed_indices(counts, [1.0] * len(counts))
    assert caught.value.where == f"the source number {number} of --data-path"


def test_the_largest_epoch() -> None:
    """3 examples with a weight of 2 are 1.5 for each unit of weight, of which there are 200,000,002."""
    with pytest.raises(ConfigError) as caught:
        check_mixture([3, 1], [2.0, 200_000_000.0])
    assert caught.value.found == "300,000,003 samples from 4 examples"
    assert caught.value.next_command == "a larger weight for the largest source, or fewer examples in it"
    check_mixture([3, 1], [2.0, 133_333_331.0])


@pytest.mark.parametrize(
    ("fraction", "first"),
    [(0.5, 2**63), (0.25, 2**62), (0.9375, 15 * 2**60), (1 - 2.0**-53, 2**64 - 2**11), (2.0**-64, 1)],
)
def test_the_border_between_the_sides(fraction: float, first: int) -> None:
    """A fraction of all 64-bit numbers, from 0 on, is for validation. `first`: the first number for training."""
    digests = np.asarray([first, first - 1, 2**64 - 1, 0], np.uint64)
    training, validation = split_by_digest(digests, fraction, "data")
    assert (training.tolist(), validation.tolist()) == ([0, 2], [1, 3])


@pytest.mark.parametrize(
    ("digests", "found", "words"),
    [
        ([2**63, 2**64 - 1, 2**63], "3 for training, 0 for validation", "larger"),
        ([5, 6], "0 for training, 2 for validation", "smaller"),
    ],
)
def test_an_empty_side_is_refused_with_both_counts(digests: list[int], found: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_by_digest(np.asarray(digests, np.uint64), 0.5, "--data-path x")
    error = caught.value
    assert (error.found, error.where) == (found, "--data-path x")
    assert error.next_command == f"a {words} --valid-fraction; or --valid-data-path"
    assert error.what == (
        f"--valid-fraction 0.5 leaves no example for {'validation' if words == 'larger' else 'training'}."
    )

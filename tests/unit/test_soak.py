"""The short form of `make soak`: damaged inputs for every reader, and a simulated fleet."""

from pathlib import Path

import pytest

from tests.soak.damage import damaged_bytes
from tests.soak.fleet import read_fleet
from tests.soak.fuzz import fuzz, fuzz_one
from tests.soak.targets import Target


def test_no_damaged_input_causes_a_traceback() -> None:
    outcomes = fuzz(num_inputs=1400, seed=1)
    assert {outcome.name: outcome.failures for outcome in outcomes if outcome.failures} == {}
    assert all(outcome.num_inputs == 100 for outcome in outcomes) and len(outcomes) == 14


def test_a_reader_that_fails_is_found() -> None:
    def read(data: bytes) -> None:
        if data != b"good":
            raise KeyError("odd")

    (failure,) = fuzz_one(Target("bad", [b"good"], damaged_bytes, read), 20, 0).failures
    assert failure.startswith("KeyError in test_soak.py")


def test_a_hundred_hosts_are_read_and_the_faulty_ones_are_named(tmp_path: Path) -> None:
    found = read_fleet(tmp_path)
    assert (found.num_shown, found.num_odd, found.problems) == (90, 10, ())


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_gives_the_same_input(seed: int) -> None:
    from random import Random

    first, second = (damaged_bytes([b"0123456789"], Random(seed)) for _ in range(2))
    assert first == second

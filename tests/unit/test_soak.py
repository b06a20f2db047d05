"""The short form of `make soak`: damaged inputs for every reader, and a simulated fleet."""

from pathlib import Path

import pytest

from tests.soak.bootstraps import outcome
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


def test_killed_bootstraps_are_judged_by_hosts_and_exit_code() -> None:
    points = '[{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 3.0}]'
    row, problems = outcome(0, f'{{"kills": 2, "good": 3, "points": {points}}}', "")
    assert row[1:] == ("2 kills", "3 of 3 hosts ended ready, and a further run changed nothing")
    assert problems == []
    row, problems = outcome(0, f'{{"kills": 3, "good": 2, "points": {points}}}', "log")
    assert row[2].startswith("2 of 3 hosts") and problems == ["bootstrap: 2 of 3 hosts ended ready\nlog"]
    assert outcome(1, f'{{"kills": 3, "good": 3, "points": {points}}}', "log")[1] != []
    assert outcome(2, "no JSON", "log") == (
        ("first `bootstrap` of a host killed and run again", "0 kills", "ended with exit code 2"),
        ["bootstrap: exit code 2\nlog"],
    )

"""The short form of the kills of `make soak`."""

import time
from pathlib import Path

from tests.soak.kills import kill_conversions, kill_trainings


def test_killed_at_random_times_and_run_again_the_result_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    end = time.monotonic() + 240
    converted = kill_conversions(tmp_path, 2, end, number=1)
    assert (converted.problems, converted.kills >= 2) == ((), True)
    trained = kill_trainings(tmp_path, 2, end, number=1)
    assert (trained.problems, trained.kills >= 2) == ((), True)

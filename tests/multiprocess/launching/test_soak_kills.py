"""The short form of the kills of `make soak`: without the seconds in which a new interpreter imports."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.multiprocess.conftest import environment_of
from tests.soak.kills import kill_conversions, kill_trainings
from tests.support.processes import commands


def forked(words: Sequence[str]) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return commands.start(["-m", "mixtral_run", *words], environment_of(), **streams, process_group=0)


def test_killed_at_random_times_and_run_again_the_result_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    forked(["--version"]).communicate()  # starts the server, which must not count as time of the first command
    end = time.monotonic() + 240
    converted = kill_conversions(tmp_path, 2, end, number=1, start=forked)
    assert (converted.problems, converted.kills >= 2) == ((), True)
    trained = kill_trainings(tmp_path, 2, end, number=1, start=forked)
    assert (trained.problems, trained.kills >= 2, trained.resumes >= 1) == ((), True, True)

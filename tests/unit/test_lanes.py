"""The two lanes of the test suite: one result of both, and an end of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lanes import LANES, NO_TESTS, exit_code

ROOT = Path(__file__).parents[2]
TESTS = """
import time
import pytest

@pytest.mark.host
def test_of_a_host():
    assert {host}

def test_of_a_model():
    {compute}

@pytest.mark.parametrize("number", range(3))
def test_more(number):
    if number == 1:
        pytest.skip("not here")
"""


def lanes(folder: Path, *words: str, host: object = True, compute: str = "pass") -> subprocess.Popen[str]:
    """Run tests of a project of its own in lanes."""
    (folder / "test_it.py").write_text(TESTS.format(host=host, compute=compute))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = host\n")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.lanes", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_both_lanes_are_counted_and_shown(tmp_path: Path) -> None:
    run = lanes(tmp_path)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert output.splitlines()[-1] == "4 passed, 0 failed, 1 skipped"
    for name in LANES:
        assert f"===== {name}: exit code 0" in output
    assert "1 passed, 4 deselected" in output and "3 passed, 1 skipped, 1 deselected" in output


@pytest.mark.parametrize("failing", ["host", "compute"])
def test_one_failing_lane_fails_the_whole_and_the_other_ends(tmp_path: Path, failing: str) -> None:
    run = lanes(tmp_path, host=failing != "host", compute="assert False" if failing == "compute" else "pass")
    output, _ = run.communicate()
    assert run.returncode == 1
    assert output.splitlines()[-1] == "3 passed, 1 failed, 1 skipped"


def test_a_lane_without_results_counts_as_failed(tmp_path: Path) -> None:
    run = lanes(tmp_path, compute="import os; os._exit(0)")
    output, _ = run.communicate()
    assert output.splitlines()[-1] == "1 passed, 1 failed, 0 skipped"
    assert run.returncode != 0


def test_arguments_reach_pytest_and_a_lane_may_be_empty(tmp_path: Path) -> None:
    run = lanes(tmp_path, "-k", "of_a_host")
    output, _ = run.communicate()
    assert (run.returncode, output.splitlines()[-1]) == (0, "1 passed, 0 failed, 0 skipped")
    assert exit_code([NO_TESTS, NO_TESTS]) == NO_TESTS
    assert exit_code([0, NO_TESTS, -signal.SIGKILL]) == signal.SIGKILL


def test_ctrl_c_ends_both(tmp_path: Path) -> None:
    started = tmp_path / "started"
    run = lanes(tmp_path, compute=f"open({str(started)!r}, 'w').close(); time.sleep(600)")
    until = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT
    assert "KeyboardInterrupt" in output
    assert output.splitlines()[-1].endswith("skipped")

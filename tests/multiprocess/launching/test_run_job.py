"""Jobs in real processes: the parent raises their errors once, with class, text and exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.multiprocess.launching.launch_worker import CONFIG

ROOT = Path(__file__).parents[3]


def test_errors_of_one_process_and_of_all_reach_the_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.multiprocess.launching.launch_worker"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, every, bug, config = (json.loads(line) for line in done.stdout.splitlines())
    assert (one["class"], one["exit_code"], one["what"]) == ("WeightsError", 5, "Only rank 1.")
    assert (one["problems"], one["next_command"]) == (["a", "ü"], "x")
    assert (every["class"], every["what"], every["problems"]) == ("TrainingError", "All ranks.", [])
    assert bug["problems"] == ["rank 1: exit code 1"]
    assert done.stderr.count("ValueError: a bug") == 1
    assert config["what"] == CONFIG.to_json()

"""Jobs in real processes: the parent raises their errors once, with class, text and exit code."""

import json

from tests.multiprocess.conftest import environment_of
from tests.multiprocess.launching.launch_worker import CONFIG
from tests.support.processes import warm


def test_errors_of_one_process_and_of_all_reach_the_parent() -> None:
    done = warm.run(["-m", "tests.multiprocess.launching.launch_worker"], environment_of())
    assert done.returncode == 0, done.stderr
    one, every, bug, config = (json.loads(line) for line in done.stdout.splitlines())
    assert (one["class"], one["exit_code"], one["what"]) == ("WeightsError", 5, "Only rank 1.")
    assert (one["problems"], one["next_command"]) == (["a", "ü"], "x")
    assert (every["class"], every["what"], every["problems"]) == ("TrainingError", "All ranks.", [])
    assert bug["problems"] == ["rank 1: exit code 1"]
    assert done.stderr.count("ValueError: a bug") == 1
    assert config["what"] == CONFIG.to_json()

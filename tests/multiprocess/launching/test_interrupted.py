"""Ctrl-C however often: the exit code stays, and nothing but the word is printed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENDING = """
import threading, time
from mixtral_run.cli import main as cli

def interrupted(**_):
    raise KeyboardInterrupt

cli.root.main = interrupted
threading.Thread(target=time.sleep, args=(0.3,)).start()  # the interpreter waits for it
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pause", [0.0005, 0.01, 0.2])
def test_said_again_while_the_process_ends_it_changes_nothing(number: int, pause: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDING], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    reported = process.stderr.readline()
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(pause)
    assert (reported + process.stderr.read(), process.returncode) == ("Interrupted.\n", 130)


def test_ctrl_c_in_a_burst_is_one(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.multiprocess.launching.stop_worker", str(tmp_path / "job"), "0.5"]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stderr
    limit = time.monotonic() + 60
    while len(list(tmp_path.glob("job.[01]"))) < 2:
        assert time.monotonic() < limit and process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    for pause in [0.001] * 8 + [0.04] * 6:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(pause)
    assert process.wait(20) == 130
    assert process.stderr.read() == "Interrupted.\n"
    assert len(list(tmp_path.glob("job.saved*"))) == 2
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.05)

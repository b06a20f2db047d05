"""Ctrl-C however often: the exit code stays, and nothing but the word is printed."""

import signal
import subprocess
import sys
import time

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

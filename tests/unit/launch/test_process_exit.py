"""A command that ends at once does all that the interpreter does at its end, but take modules apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO

PROGRAM = """
import atexit, sys, threading, time
from mixtral_run.launch import processes
from mixtral_run.launch.imports import importing
import mixtral_run.__main__ as program, mixtral_run.cli.main

class Left:
    def __del__(self):
        print("taken apart")

left = Left()
def run():
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("printed", end=" ")
    sys.exit(CODE)

mixtral_run.cli.main.main = run
processes._fork_server_environment.update({ENVIRONMENT})
program.main()
"""


def ended(code: str, environment: str = "A='1'", out: int | IO[str] = subprocess.PIPE) -> CompletedProcess[str]:
    argv = [sys.executable, "-c", PROGRAM.replace("CODE", code).replace("{ENVIRONMENT}", environment)]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, env=buffered, text=True, check=False)


def test_threads_exit_functions_and_output_are_complete_and_the_code_is_kept() -> None:
    done = ended("6")
    assert (done.returncode, done.stdout, done.stderr) == (6, "printed thread\nat exit\n", "")
    assert ended("None").returncode == 0


def test_other_commands_and_ends_are_left_to_the_interpreter() -> None:
    assert ended("3", environment="").stdout == "printed thread\nat exit\ntaken apart\n"
    message = ended("'no'")
    assert (message.returncode, message.stderr) == (1, "no\n")
    with Path("/dev/full").open("w") as full:
        assert ended("0", out=full).returncode == 120

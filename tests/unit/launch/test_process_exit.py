"""A command that ends at once does all that the interpreter does at its end, but take modules apart."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from types import FrameType, SimpleNamespace
from typing import IO, cast

import pytest

from mixtral_run.launch import process_exit

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
    BEFORE
    sys.exit(CODE)

mixtral_run.cli.main.main = run
processes._fork_server_environment.update({ENVIRONMENT})
program.main()
"""


def ended(
    code: str,
    environment: str = "A='1'",
    out: int | IO[str] = subprocess.PIPE,
    start: str = "",
    before: str = "",
    closed: str = "",
    wrapper: str = "PROGRAM",
) -> CompletedProcess[str]:
    """Run the program. start, before: lines for its start and before its end. closed: redirections of a shell."""
    program = PROGRAM.replace("CODE", code).replace("{ENVIRONMENT}", environment).replace("BEFORE", before)
    argv = [sys.executable, "-c", start + wrapper.replace("PROGRAM", program)]
    if closed:
        argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *argv]
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


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_changes_no_exit_code_and_is_no_file(closed: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    opening = f"descriptor = os.open({str(file)!r}, os.O_WRONLY | os.O_CREAT); assert descriptor > 2"
    writing = "os.write(1, b'1'); os.write(2, b'2'); print('3', file=sys.stderr); assert not sys.stdin.read()"
    child = "assert subprocess.call([sys.executable, '-c', 'import sys; print(1); print(2, file=sys.stderr)']) == 0"
    before = f"import os, subprocess; {opening}; {writing}; {child}"
    assert ended("6", before=before, closed=closed).returncode == 6
    assert file.read_bytes() == b""


def test_a_stream_that_the_program_closed_is_not_flushed() -> None:
    before = "atexit.unregister(print); time.sleep(0.4); sys.stdout.close()"
    assert (done := ended("6", before=before)).returncode == 6
    assert (done.stdout, done.stderr) == ("printed thread\n", "")


INTERRUPT = """
import os, signal
def interrupt(function, again):
    inside = False
    while not inside:
        time.sleep(0.05)
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame is not None:
            inside |= frame.f_code.co_name == function
            frame = frame.f_back
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.4)
    while again:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
"""


def test_ctrl_c_ends_the_wait_for_threads_and_loses_no_output() -> None:
    done = ended("0", start=INTERRUPT, before="threading.Thread(target=interrupt, args=('_shutdown', False)).start()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "printed thread\nat exit\n", "")


@pytest.mark.parametrize(("code", "expected"), [("0", 130), ("6", 6)])
def test_output_that_ctrl_c_cut_off_is_no_success(code: str, expected: int) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(2**16))
    os.set_blocking(writer, True)
    before = "threading.Thread(target=interrupt, args=('end_at_once', True), daemon=True).start()"
    done = ended(code, start=INTERRUPT, before=before, out=writer)
    os.close(writer)
    os.close(reader)
    assert done.returncode == expected


def test_a_profiler_and_a_tracer_get_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    program = cast(FrameType, SimpleNamespace(f_back=None))
    # Whatever the tests themselves run under.
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "getprofile", lambda: None)
    tools: dict[int, str] = {}
    monkeypatch.setattr(sys, "monitoring", SimpleNamespace(get_tool=tools.get), raising=False)
    assert not process_exit._is_observed(program)
    for hook in ("gettrace", "getprofile"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, hook, lambda: print)
            assert process_exit._is_observed(program)
    tools[2] = "cProfile"
    assert process_exit._is_observed(program)


def test_another_program_that_runs_this_one_gets_the_end() -> None:
    wrapper = "try:\n    exec('''PROGRAM''', {})\nfinally:\n    print('the other goes on')"
    done = ended("3", wrapper=wrapper)
    assert (done.returncode, done.stdout.count("the other goes on")) == (3, 1)

"""Ctrl-C and SIGTERM while convert copies: what is whole is kept, at whatever moment; Ctrl-C again ends at once."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from mixtral_run.weights.convert.copy import _Worker
from mixtral_run.weights.io.interrupts import SAME_SECONDS
from tests.multiprocess.conftest import environment_of
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.multiprocess.weights.test_convert_errors import content
from tests.support.processes import commands
from tests.support.tiny import write_tiny

NUM_QUICK = 32
"""Reads before the moment at which the tests send their signals."""

SLOWED = """
import itertools, os, pathlib, sys, time
import mixtral_run.weights.convert.copy as copy
reached, num_quick, seconds = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1)), float(sys.argv.pop(1))
# Nothing is noted but by the stop itself, as in the first five seconds.
copy.FLUSH_SECONDS = 1e6
read, numbers = copy._Worker._read, itertools.count()

def slow(*arguments):
    if next(numbers) >= num_quick:
        reached.touch()
        time.sleep(seconds)
    read(*arguments)

copy._Worker._read = slow
"""
MAIN = """
from mixtral_run.cli.main import main
main()
"""
SMALL_BLOCKS = """
copy.BLOCK_BYTES, copy.PATIENCE_SECONDS = 100, 0.5
"""
DISK_THAT_TAKES_LONG = """
syncing, sync = reached.with_name("syncing"), os.fdatasync
os.fdatasync = lambda descriptor: (syncing.touch(), time.sleep(600), sync(descriptor))
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "hf")
    return tmp_path / "hf"


def start(code: str, *words: str | Path) -> subprocess.Popen[str]:
    argv = ["-c", code + MAIN, *map(str, words)]
    return commands.start(argv, environment_of(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_convert(tiny: Path, seconds: float, *more: str, num_quick: int = NUM_QUICK) -> subprocess.Popen[str]:
    """Into `out` beside the model; the file `reached` is there when the reads begin to take so long."""
    words = ("convert", "--hf-model-path", tiny, "--output-path", tiny.parent / "out")
    return start(SLOWED + "".join(more), tiny.parent / "reached", str(num_quick), str(seconds), *words)


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def num_noted(tmp_path: Path) -> int:
    return (tmp_path / ".out.unfinished" / "journal.jsonl").read_text().count("\n") - 1


def goes_on(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command does the jobs that are not noted, no other, and ends with the bytes of one never stopped."""
    noted, copy = num_noted(tmp_path), _Worker.copy
    done: list[Path] = []
    for name in ("out", "whole"):
        with monkeypatch.context() as patched:
            patched.setattr(_Worker, "copy", lambda self, job: (done.append(self._folder.parent), copy(self, job))[1])
            convert_quietly(tiny, tmp_path / name, 2, 4)
    assert noted + done.count(tmp_path / ".out.unfinished") == done.count(tmp_path / ".whole.unfinished")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / ".out.unfinished").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_what_is_copied_before_the_journal_was_written_even_once_is_kept(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, how: int
) -> None:
    process = start_convert(tiny, 0.3)
    wait_for(tmp_path / "reached", process)
    process.send_signal(how)
    process.send_signal(signal.SIGTERM)  # `timeout` and torchrun say it twice
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "Interrupted.")
    assert "Stopping" in output
    assert "the same command continues from there" in output
    assert num_noted(tmp_path) >= NUM_QUICK / 4  # a job reads once, or a few times
    goes_on(tmp_path, tiny, monkeypatch)


def test_what_reads_its_output_may_be_gone(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `| tee` is, which Ctrl-C ends as well."""
    process = start_convert(tiny, 0.3)
    wait_for(tmp_path / "reached", process)
    assert process.stdout and process.stderr
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read()
    assert (process.wait(60), errors.strip()) == (130, "Interrupted.")
    goes_on(tmp_path, tiny, monkeypatch)


def test_a_job_that_takes_long_is_not_waited_for(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_convert(tiny, 0.4, SMALL_BLOCKS, num_quick=5000)
    wait_for(tmp_path / "reached", process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # A tensor of an expert takes 98 s.
    assert time.monotonic() - began < 10
    assert (process.returncode, errors.strip()) == (130, "Interrupted.")
    goes_on(tmp_path, tiny, monkeypatch)


def test_ctrl_c_again_ends_at_once_and_nothing_is_noted_that_is_not_on_the_disk(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start_convert(tiny, 0.3, DISK_THAT_TAKES_LONG)
    wait_for(tmp_path / "reached", process)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "syncing", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_SECONDS + 0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "Ctrl-C again ends at once" in output
    assert num_noted(tmp_path) == 0
    goes_on(tmp_path, tiny, monkeypatch)


def test_sigterm_on_the_way_back_leaves_nothing(tmp_path: Path, tiny: Path) -> None:
    convert_quietly(tiny, tmp_path / "whole", 2, 4)
    slowed = """
import pathlib, sys, time
import mixtral_run.weights.convert.to_hf as to_hf
reached = pathlib.Path(sys.argv.pop(1))
to_hf._Writer.write = lambda self, file, tensors: (file.touch(), reached.touch(), time.sleep(600))
"""
    words = ("convert", "--from-megatron", tmp_path / "whole", "--output-path", tmp_path / "again")
    process = start(slowed, tmp_path / "reached", *words)
    wait_for(tmp_path / "reached", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "Interrupted.")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "reached", "whole"]

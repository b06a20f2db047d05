"""Ctrl-C while modules are imported: one word, exit code 130, at any moment."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_run.launch import imports

SLOW = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)
from mixtral_run.launch.imports import importing
class Swallows:
    def find_spec(self, name, *_):
        if name == "mixtral_run.cli.main":
            print("importing", flush=True)
            try:
                import time; time.sleep(20)
            except BaseException:
                pass
sys.meta_path.insert(0, Swallows())
from mixtral_run.__main__ import main
main()
"""


def test_ctrl_c_during_an_import_that_swallows_it_ends_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=15)[1] == "Interrupted.\n"
    assert process.returncode == 130


def test_under_torchrun_one_process_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    for local_rank in ("0", "1", "2"):
        (tmp_path / local_rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / local_rank / "error.json"))
        imports._leave(signal.SIGINT, None)
    assert (capfd.readouterr().err, ends) == ("Interrupted.\n", [130] * 3)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_the_handler_is_the_same_afterwards(handler: signal.Handlers) -> None:
    from mixtral_run.launch.imports import importing

    before = signal.signal(signal.SIGINT, handler)
    try:
        with importing():
            inside = signal.getsignal(signal.SIGINT)
        assert (inside is handler) == (handler is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)

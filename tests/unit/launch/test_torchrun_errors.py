"""One error for all processes of a user's torchrun, without torchrun's summary behind it."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_run.launch.torchrun_errors import (
    ERROR_FILE_VARIABLE,
    _is_worth_showing,
    exit_code_of,
    print_once,
    rendezvous_handler,
    runs_the_kit,
)


def test_the_first_process_prints_and_the_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for local_rank in ("0", "1", "2"):
        (tmp_path / local_rank).mkdir()
        monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / local_rank / "error.json"))
        assert print_once("✗ The settings are wrong.")
    assert capsys.readouterr().err == "✗ The settings are wrong.\n"
    assert print_once("✗ Another error.")
    assert capsys.readouterr().err == "✗ Another error.\n"


def test_without_a_folder_of_torchruns_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ERROR_FILE_VARIABLE, raising=False)
    assert not print_once("x")
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "none" / "0" / "error.json"))
    assert not print_once("x")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["torchrun", "--nproc_per_node", "8", "-m", "mixtral_run", "convert"], True),
        (["run.py", "--standalone", "--module", "mixtral_run", "finetune"], True),
        (["torchrun", "-m", "other", "mixtral_run"], False),
        (["mixtral-run", "finetune", "--load", "mixtral_run"], False),
    ],
)
def test_only_a_torchrun_of_the_kit_is_changed(words: list[str], expected: bool) -> None:
    assert runs_the_kit(words) is expected


def test_torchrun_finds_the_handler_and_it_is_no_backend() -> None:
    (entry,) = importlib.metadata.entry_points(group="torchrun.handlers", name="mixtral_run")
    assert entry.load() is rendezvous_handler
    with pytest.raises(ValueError, match="not a rendezvous backend"):
        rendezvous_handler()({})


class ChildFailedError(Exception):
    def __init__(self, *failures: tuple[int, int]) -> None:
        pairs = enumerate(failures)
        self.failures = {rank: SimpleNamespace(timestamp=when, exitcode=code) for rank, (when, code) in pairs}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ChildFailedError((9, 2), (3, 5)), 5),
        # Ended by torchrun, which left one process that reported its error.
        (ChildFailedError((1, -15), (2, 6)), 6),
        # A traceback, and a process that the kernel killed: torchrun's summary says more.
        (ChildFailedError((1, 1), (2, -15)), None),
        (ChildFailedError((1, -9), (2, 6)), None),
        (ChildFailedError((1, 130)), 130),
        (ValueError(), None),
    ],
)
def test_the_exit_code_is_that_of_the_first_reported_error(error: Exception, code: int | None) -> None:
    assert exit_code_of(error) == code


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("failed (exitcode: 2) local_rank: 1 (pid: 7) of binary: python", False),
        ("failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python", True),
        ("failed (exitcode: 1) local_rank: 1 (pid: 7) of binary: python", True),
        ("Sending process 8518 closing signal SIGTERM", False),
        ("Unable to shutdown process 7 via SIGTERM, forcefully exiting via SIGKILL", True),
    ],
)
def test_what_torchrun_logs_of_reported_errors_is_hidden(text: str, shown: bool) -> None:
    record = logging.LogRecord("torch", logging.ERROR, "", 0, text, None, None)
    assert _is_worth_showing(record) is shown

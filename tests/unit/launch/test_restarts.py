"""A job in a container that its engine starts again: what is repeated, how, and what is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral_run.launch import restarts
from mixtral_run.launch.restarts import Attempts, main, wait_seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "SHORTEST_SECONDS", 0.01)
    monkeypatch.setattr(restarts.signal, "signal", lambda *_: None)


def attempt(folder: Path, code: int, *, resumes: bool = True) -> tuple[int, str]:
    """One life of the container; the program writes its arguments and ends with `code`."""
    program = ["sh", "-c", f'echo "$@" >"{folder}/words"; exit {code}', "job", "--config", "c.json"]
    found = main([str(folder), *(["--resumes"] if resumes else []), *program])
    return found, (folder / "words").read_text().strip()


def test_every_attempt_after_the_first_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(tmp_path, 6) == (6, "--config c.json")
    assert capsys.readouterr().out == ""
    assert attempt(tmp_path, 137) == (137, "--config c.json --resume auto")
    assert "attempt 2 in 0 s" in capsys.readouterr().out
    assert attempt(tmp_path, 0) == (0, "--config c.json --resume auto")
    assert Attempts.read(tmp_path) == Attempts(3)


def test_a_verb_without_resume_is_repeated_as_it_is(tmp_path: Path) -> None:
    attempt(tmp_path, 6, resumes=False)
    assert attempt(tmp_path, 0, resumes=False) == (0, "--config c.json")


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_what_repeating_cannot_cure_is_not_started_again(tmp_path: Path, code: int) -> None:
    attempt(tmp_path, code)
    (tmp_path / "words").write_text("nothing ran")
    assert attempt(tmp_path, 0) == (code, "nothing ran")


def test_the_wait_doubles_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "SHORTEST_SECONDS", 5.0)
    assert [wait_seconds(count) for count in (0, 1, 2, 3, 20)] == [0, 5, 10, 20, 300]


def test_a_damaged_state_is_that_of_the_first_attempt(tmp_path: Path) -> None:
    for text in ("", "[]", '{"count": "x"}', '{"count": 1}'):
        (tmp_path / "attempts.json").write_text(text)
        assert Attempts.read(tmp_path) == Attempts()


def test_a_signal_reaches_the_program_and_its_end_is_that_of_the_container(tmp_path: Path) -> None:
    program = [
        "sh",
        "-c",
        f'trap "echo saved >{tmp_path}/saved; exit 143" TERM; touch {tmp_path}/up; while :; do sleep 0.05; done',
    ]
    words = [sys.executable, "-m", "mixtral_run.launch.restarts", str(tmp_path), *program]
    with subprocess.Popen(words) as container:
        while not (tmp_path / "up").exists():
            assert container.poll() is None
            time.sleep(0.02)
        container.send_signal(signal.SIGTERM)
        assert container.wait(20) == 143
    assert (tmp_path / "saved").read_text() == "saved\n"

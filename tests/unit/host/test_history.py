"""The history that a host keeps: one line a record, bounded, and no link leads root elsewhere."""

import json
import os
import runpy
import subprocess
import time
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import history

from tests.unit.host.conftest import ROOT, call_module, load_module


def test_each_call_adds_a_line_that_all_can_read_and_reports_no_change(tmp_path):
    path, module = tmp_path / "log/history.jsonl", load_module("host_visit")
    settings = {"verb": "bootstrap", "path": str(path)}
    for number, state in enumerate(("began", "ended")):
        found = call_module(module, tmp_path, state=state, entry=f"line {number}", **settings)
        assert found == {"changed": False}
    call_module(module, tmp_path, check_mode=True, state="ended", entry="line 2", **settings)
    assert path.read_text() == "line 0\nline 1\n" and path.stat().st_mode & 0o777 == 0o644


def test_a_line_that_a_crash_cut_off_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"cut')
    history.append("next", str(path))
    assert path.read_text() == '{"cut\nnext\n'


def test_a_long_history_loses_its_oldest_lines(tmp_path):
    path = tmp_path / "history.jsonl"
    for number in range(60):
        history.append(json.dumps([number, "ü" * 1000]), str(path))
        assert path.stat().st_size <= history.MAX_BYTES
    numbers = [json.loads(each)[0] for each in path.read_text().splitlines()]
    assert numbers == list(range(numbers[0], 60)) and 0 < numbers[0] < 50
    assert path.stat().st_mode & 0o777 == 0o644 and [file.name for file in tmp_path.iterdir()] == ["history.jsonl"]


def test_bounds_of_a_history(tmp_path):
    """Lines of 1,024 bytes: 256 of them are as many as it may have, one more leaves half of them, the newest."""
    path = tmp_path / "history.jsonl"
    path.write_text(("a" * 1023 + "\n") * 255)
    history.append("b" * 1023, str(path))
    assert path.stat().st_size == 262_144
    history.append("c" * 1023, str(path))
    lines = path.read_text().splitlines()
    # The first of the newest 131,072 bytes is dropped with the rest of its line.
    assert [len(lines), lines[0][0], lines[-2][0], lines[-1][0]] == [127, "a", "b", "c"]
    history.append("d" * 8191, str(path))
    with pytest.raises(OSError, match="too long"):
        history.append("d" * 8192, str(path))


@pytest.mark.parametrize("line", ["two\nlines", "x" * history.MAX_LINE_BYTES])
def test_only_one_short_line_is_written(tmp_path, line):
    with pytest.raises(OSError, match="too long, or more than one"):
        history.append(line, str(tmp_path / "history.jsonl"))
    assert not any(tmp_path.iterdir())


def test_a_link_and_a_pipe_are_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("content")
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=name):
            history.append("line", str(tmp_path / name))
    assert victim.read_text() == "content"


def test_a_lock_that_another_operator_took_in_the_meantime_is_noted(tmp_path: Path) -> None:
    """The laptop slept, and the host freed the lock."""
    lock = runpy.run_path(str(ROOT / "plugins/plugin_utils/setup_lock.py"))
    for name, script in {
        "sleep": "exec /bin/sleep 0.05",
        "host": f"cd {tmp_path}; if mkdir first 2>/dev/null; then echo held; else echo 'busy {{}} x'; fi",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    file = tmp_path / "lock"
    (tmp_path / "lock.wanted").touch()
    assert lock["lost_to"](file) is None
    argv = ["sh", "-c", lock["KEEPER"], "keeper", str(os.getpid()), str(file), str(tmp_path / "host")]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as keeper:
        until = time.monotonic() + 20
        while not lock["lost_to"](file) and time.monotonic() < until:
            time.sleep(0.02)
        (tmp_path / "lock.wanted").unlink()
    assert keeper.wait() == 0 and lock["lost_to"](file) == "a holder that does not name itself"
    assert (tmp_path / "lock.lost").read_text() == "{} x"

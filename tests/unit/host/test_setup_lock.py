"""The lock that a play takes without the command line: what is believed of a note, and which connections have it."""

import importlib.util
import json
import os
import socket
import subprocess
from types import SimpleNamespace

import pytest

from tests.unit.host.conftest import ROOT

NOTE = {"command": "mixtral-run teardown", "user": "ann", "host": "laptop", "pid": 7, "since": "2026-11-30T10:00:00Z"}


@pytest.fixture
def lock():
    spec = importlib.util.spec_from_file_location("setup_lock", ROOT / "plugins/plugin_utils/setup_lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("note", ["", "null", "[]", "x", '{"pid": 1}', "[" * 9000, json.dumps({**NOTE, "user": 3})])
def test_an_odd_note_is_no_holder(lock, note):
    assert lock.holder(note) == "a holder that does not name itself"
    assert not lock._is_dead(note)


def test_a_note_is_one_short_line(lock):
    evil = {**NOTE, "user": "a\x1b[2Jnn\n", "host": "l" * 5000}
    told = lock.holder(json.dumps(evil))
    assert told.isprintable() and len(told) < 400
    assert told.startswith("mixtral-run teardown by a[2Jnn@lll")
    assert lock.holder(json.dumps(NOTE)) == "mixtral-run teardown by ann@laptop, process 7, since 2026-11-30T10:00:00Z"


def test_only_a_run_of_this_machine_is_known_to_be_dead(lock):
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = {**NOTE, "host": socket.gethostname()}
    assert lock._is_dead(json.dumps({**mine, "pid": ended.pid}))
    assert not lock._is_dead(json.dumps({**mine, "pid": os.getpid()}))
    assert not lock._is_dead(json.dumps({**NOTE, "pid": ended.pid}))


def test_the_lock_goes_over_the_connection_of_the_play(lock):
    built = []

    def build(*words):
        built.append(words)
        return [b"sshpass", b"-d7", *(os.fsencode(word) for word in words)]

    options = {"ssh_executable": "ssh", "host": "10.0.0.1"}
    ssh = SimpleNamespace(transport="ansible.builtin.ssh", get_option=options.get, _build_command=build)
    # The password was needed for the first connection alone.
    assert lock._argv(ssh, ["sh", "-c", "a b"])[:2] == ["ssh", "ssh"]
    assert built == [("ssh", "ssh", "-o", "BatchMode=yes", "10.0.0.1", "sh -c 'a b'")]
    assert lock._argv(SimpleNamespace(transport="local"), ["sh"]) == ["sh"]
    assert lock.take(SimpleNamespace(transport="docker"), None, "x") == (
        "", "Two operators are not kept apart here: connection docker has no lock",
    )  # fmt: skip


def test_it_is_given_back_after_the_task_that_took_it_has_ended(lock, tmp_path, monkeypatch):
    """Each task of a play is a process of its own; nobody reads the keeper's output after it."""
    monkeypatch.setenv("MIXTRAL_RUN_LOCK_FOLDER", str(tmp_path))
    file = tmp_path / "held-here"
    pid = os.fork()
    if pid == 0:
        refused, warning = lock.take(SimpleNamespace(transport="local"), file, "mixtral-run bootstrap")
        os._exit(bool(refused or warning))
    assert os.waitpid(pid, 0)[1] == 0 and file.exists()
    lock.give_back(file)
    assert not file.exists()
    assert (tmp_path / "mixtral-run-setup.lock").read_text() == ""

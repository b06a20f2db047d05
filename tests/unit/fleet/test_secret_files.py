"""The operator's files of secrets: for this user alone under any umask, and gone afterwards, also after an error."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_run.fleet.secrets import token_file
from mixtral_run.fleet.ssh.connection import _askpass
from mixtral_run.fleet.state import state_folder, write_json, write_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def open_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = os.umask(0)
    yield
    os.umask(before)


def test_the_state_folder_is_closed_to_others_even_if_it_was_open() -> None:
    folder = state_folder("plays", "one")
    assert [mode(each) for each in (folder, folder.parents[1])] == [0o700, 0o700]
    folder.chmod(0o755)
    folder.parents[1].chmod(0o755)
    state_folder("plays", "one")
    assert [mode(each) for each in (folder, folder.parents[1])] == [0o700, 0o700]


def test_private_files_replace_open_ones_and_leave_nothing_beside(tmp_path: Path) -> None:
    for write in (lambda path: write_private(path, "text"), lambda path: write_json(path, {})):
        path = tmp_path / "folder" / "file"
        path.parent.mkdir(exist_ok=True)
        path.write_text("before")
        path.chmod(0o666)
        write(path)
        assert mode(path) == 0o600
        assert list(path.parent.iterdir()) == [path]


def test_a_private_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, _name=name, _real=real: (calls.append(_name), _real(*given))[1])
    write_private(tmp_path / "file", "text")
    assert calls == ["fsync", "rename"]


def test_a_write_that_fails_leaves_the_old_file_and_no_copy_of_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(tmp_path / "file", "hf_secret")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "before")]


@pytest.mark.parametrize("fails", [False, True])
def test_a_typed_token_is_a_private_file_for_as_long_as_it_is_needed(fails: bool) -> None:
    with pytest.raises(ZeroDivisionError), token_file("-", lambda: "  hf_abc\n") as path:
        assert path is not None
        assert path.read_text() == "hf_abc\n" and mode(path) == 0o600 and mode(path.parent) == 0o700
        if fails:
            raise ZeroDivisionError
        path.unlink()  # somebody else removed it: no error
        raise ZeroDivisionError
    assert not path.exists()
    with token_file("-", lambda: "hf_abc") as path:
        pass
    assert path is not None and not path.exists()


def test_a_given_token_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_abc")
    with token_file("~/token", lambda: pytest.fail("nothing is asked")) as path:
        assert path == tmp_path / "token"
    assert (tmp_path / "token").read_text() == "hf_abc"
    # Only a dash alone stands for the question, whatever comes before or after it in the alphabet.
    for name in ("+token", "--", "0"):
        with token_file(name, lambda: pytest.fail("nothing is asked")) as path:
            assert path == Path(name)
    with token_file(None, lambda: pytest.fail("nothing is asked")) as path:
        assert path is None


def test_a_password_is_readable_by_this_user_alone_and_gone_afterwards() -> None:
    password = 'it\'s $(reboot) "x"'
    with pytest.raises(ZeroDivisionError), _askpass(password) as environment:
        program = Path(environment["SSH_ASKPASS"])
        (secret,) = [each for each in program.parent.iterdir() if each != program]
        assert [mode(each) for each in (program.parent, program, secret)] == [0o700, 0o700, 0o600]
        assert password not in "".join([*environment.values(), program.read_text()])
        assert environment["SSH_ASKPASS_REQUIRE"] == "force" and environment["DISPLAY"]
        assert secret.read_text() == password + "\n"
        assert program.read_text() == f"#!/bin/sh\nexec cat {secret}\n"
        raise ZeroDivisionError
    assert not program.parent.exists()

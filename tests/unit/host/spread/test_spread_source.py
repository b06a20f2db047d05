"""The line that lets another host read a model comes and goes in authorized_keys, and every other line stays."""

import os
import pwd
import stat
import threading
import time
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.spread import keys, serve

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("spread_source")
OWN = "ssh-ed25519 AAAA somebody's own key, without an end of line"


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pwd.struct_passwd:
    uid = 4321 if os.geteuid() == 0 else os.geteuid()
    found = pwd.struct_passwd(("ops", "x", uid, os.getegid(), "", str(tmp_path / "ops"), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", lambda _: found)
    monkeypatch.setattr(keys, "PROGRAMS", str(tmp_path / "programs"))
    return found


def _ask(tmp_path: Path, state: str, asker: str = "gpu-02", **more: object) -> dict:
    (tmp_path / "blobs").mkdir(exist_ok=True)
    return call_module(MODULE, tmp_path, state=state, asker=asker, folder=str(tmp_path / "blobs"), **more)


def test_it_opens_and_closes_and_leaves_the_rest(user: pwd.struct_passwd, tmp_path: Path) -> None:
    _ask(tmp_path, "closed")
    assert not Path(user.pw_dir).exists()
    keys = tmp_path / "keys of a dotfiles folder"
    keys.write_text(OWN)
    (tmp_path / "ops/.ssh").mkdir(parents=True)
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    authorized.symlink_to(keys)
    for _ in range(2):
        assert "PRIVATE KEY" in _ask(tmp_path, "open")["private_key"]
    first, second = keys.read_text().splitlines()
    assert first == OWN
    assert second.startswith("restrict,expiry-time=") and second.endswith(" mixtral-run-copy-for-gpu-02")
    assert authorized.is_symlink()
    assert (stat.S_IMODE(keys.stat().st_mode), keys.stat().st_uid) == (0o600, user.pw_uid)
    _ask(tmp_path, "closed")
    assert keys.read_text() == OWN + "\n" and not list((tmp_path / "programs").iterdir())


def test_a_new_folder_that_becomes_a_link_gives_nothing_away(
    user: pwd.struct_passwd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user replaces the folder of the keys by a link as soon as root created it."""
    outside, create = tmp_path / "outside", os.makedirs
    outside.mkdir()

    def race(path: str, *args: int, **options: bool | int) -> None:
        create(path, *args, **options)
        if path.endswith("/.ssh"):
            Path(path).rmdir()
            Path(path).symlink_to(outside)

    monkeypatch.setattr(os, "makedirs", race)
    before = outside.stat().st_uid
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        keys.Doors("ops")._rewrite(str, "key mark\n")
    assert outside.stat().st_uid == before and not list(outside.iterdir())


def test_hosts_that_ask_at_once_take_no_line_of_each_other(
    user: pwd.struct_passwd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    read = keys.read_text

    def read_slowly(path: str) -> str:
        text = read(path)
        time.sleep(0.05)
        return text

    monkeypatch.setattr(keys, "read_text", read_slowly)
    marks = [f"for-{number}" for number in range(6)]
    threads = [threading.Thread(target=keys.Doors("ops")._rewrite, args=(str, f"key {mark}\n")) for mark in marks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(authorized.read_text().splitlines()) == [f"key {mark}" for mark in marks]


def test_a_host_serves_no_more_than_it_may_and_forgets_expired_keys(user: pwd.struct_passwd, tmp_path: Path) -> None:
    _ask(tmp_path, "open", "gpu-02", most=2, mib_per_second=10)
    _ask(tmp_path, "open", "gpu-03", most=2)
    refused = _ask(tmp_path, "open", "gpu-04", most=2)
    assert refused["problem"] == "it serves 2 already: gpu-02, gpu-03" and "private_key" not in refused
    assert sorted(each.stem[-6:] for each in (tmp_path / "programs").iterdir()) == ["gpu-02", "gpu-03"]
    # One that asks again takes its own place.
    assert "private_key" in _ask(tmp_path, "open", "gpu-03", most=2)
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    assert f'{tmp_path}/blobs {5 * 2**20}"' in authorized.read_text(), "half of the rate for each of two"
    authorized.write_text(authorized.read_text().replace('expiry-time="2', 'expiry-time="1', 1))
    assert "private_key" in _ask(tmp_path, "open", "gpu-04", most=2)


def test_the_keys_of_a_killed_run_are_taken_back(user: pwd.struct_passwd, tmp_path: Path) -> None:
    for asker in ("gpu-02", "gpu-03"):
        _ask(tmp_path, "open", asker)
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    authorized.write_text(OWN + "\n" + authorized.read_text())
    assert _ask(tmp_path, "closed", "")["changed"] and not _ask(tmp_path, "closed", "")["changed"]
    assert authorized.read_text() == OWN + "\n" and not (tmp_path / "programs").exists()


def test_the_program_of_the_key_is_the_one_that_serves(user: pwd.struct_passwd, tmp_path: Path) -> None:
    _ask(tmp_path, "open")
    (program,) = (tmp_path / "programs").iterdir()
    assert program.read_text() == Path(serve.__file__).read_text()

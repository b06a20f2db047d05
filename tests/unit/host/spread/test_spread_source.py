"""The line that lets another host read a model comes and goes in authorized_keys, and every other line stays."""

import os
import pwd
import re
import runpy
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
    given = {"run_id": "1a", "folder": str(tmp_path / "blobs")} | more
    return call_module(MODULE, tmp_path, state=state, asker=asker, **given)


def test_it_opens_and_closes_and_leaves_the_rest(user: pwd.struct_passwd, tmp_path: Path) -> None:
    _ask(tmp_path, "closed")
    assert not Path(user.pw_dir).exists()
    (tmp_path / "ops/.ssh").mkdir(parents=True)
    keys = tmp_path / "ops/.ssh/authorized_keys"
    keys.write_text(OWN)
    keys.chmod(0o640)
    owner = keys.stat().st_uid
    for _ in range(2):
        assert "PRIVATE KEY" in _ask(tmp_path, "open")["private_key"]
    first, second = keys.read_text().splitlines()
    assert first == OWN
    assert second.startswith("restrict,expiry-time=") and second.endswith(" mixtral-run-copy-for-1a+gpu-02")
    assert (stat.S_IMODE(keys.stat().st_mode), keys.stat().st_uid) == (0o640, owner)
    _ask(tmp_path, "closed")
    assert keys.read_text() == OWN + "\n" and not list((tmp_path / "programs").iterdir())


def test_a_new_folder_that_becomes_a_link_gives_nothing_away(
    user: pwd.struct_passwd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user replaces the folder of the keys by a link as soon as root created it."""
    outside, create = tmp_path / "outside", os.mkdir
    outside.mkdir()
    (tmp_path / "ops").mkdir()

    def race(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        create(path, mode, dir_fd=dir_fd)
        (tmp_path / "ops/.ssh").rmdir()
        (tmp_path / "ops/.ssh").symlink_to(outside)

    monkeypatch.setattr(os, "mkdir", race)
    before = outside.stat().st_uid
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        keys.Doors("ops")._rewrite(str, "key mark\n")
    assert outside.stat().st_uid == before and not list(outside.iterdir())


def test_hosts_that_ask_at_once_take_no_line_of_each_other(
    user: pwd.struct_passwd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    (tmp_path / "ops").mkdir()
    read = keys.Doors._text

    def read_slowly(doors: keys.Doors, folder: int) -> tuple:
        found = read(doors, folder)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(keys.Doors, "_text", read_slowly)
    marks = [f"for-{number}" for number in range(6)]
    threads = [threading.Thread(target=keys.Doors("ops")._rewrite, args=(str, f"key {mark}\n")) for mark in marks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(authorized.read_text().splitlines()) == [f"key {mark}" for mark in marks]


def test_a_host_serves_no_more_than_it_may_and_forgets_expired_keys(user: pwd.struct_passwd, tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    _ask(tmp_path, "open", "gpu-02", most=2, mib_per_second=10)
    _ask(tmp_path, "open", "gpu-03", most=2)
    refused = _ask(tmp_path, "open", "gpu-04", most=2)
    assert refused["problem"] == "it serves 2 already: gpu-02, gpu-03" and "private_key" not in refused
    assert sorted(each.stem[-6:] for each in (tmp_path / "programs").iterdir()) == ["gpu-02", "gpu-03"]
    # One that asks again takes its own place.
    assert "private_key" in _ask(tmp_path, "open", "gpu-03", most=2)
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    program = tmp_path / "programs/mixtral-run-copy-for-1a+gpu-02.py"
    assert f"SERVED = ('{tmp_path}/blobs', {5 * 2**20})" in program.read_text(), "half of the rate for each of two"
    authorized.write_text(authorized.read_text().replace('expiry-time="2', 'expiry-time="1', 1))
    assert "private_key" in _ask(tmp_path, "open", "gpu-04", most=2)


def test_the_keys_of_a_killed_run_are_taken_back(user: pwd.struct_passwd, tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    for asker in ("gpu-02", "gpu-03"):
        _ask(tmp_path, "open", asker)
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    authorized.write_text(OWN + "\n" + authorized.read_text())
    assert _ask(tmp_path, "closed", "")["changed"] and not _ask(tmp_path, "closed", "")["changed"]
    assert authorized.read_text() == OWN + "\n" and not (tmp_path / "programs").exists()


def test_the_program_of_the_key_is_the_one_that_serves(user: pwd.struct_passwd, tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    _ask(tmp_path, "open")
    (program,) = (tmp_path / "programs").iterdir()
    own = Path(serve.__file__).read_text()
    assert program.read_text() == own.replace('("", 0)', f"('{tmp_path}/blobs', 0)") != own


def test_the_line_holds_words_of_the_kit_only_and_a_time_that_old_servers_read(
    user: pwd.struct_passwd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSH before 9.1, as of Ubuntu 20.04 and 22.04, refuses a key whose time ends with Z."""
    (tmp_path / "ops").mkdir()
    folder = tmp_path / "a b\";$(id)\n'"
    folder.mkdir()
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    call_module(MODULE, tmp_path, state="open", asker="gpu-02; id é", folder=str(folder), hours=1)
    (line,) = (tmp_path / "ops/.ssh/authorized_keys").read_text().splitlines()
    command = rf"/usr/bin/env python3 ({tmp_path}/programs/[\w.+-]+)"
    form = rf'restrict,expiry-time="(\d{{12}})",command="{command}" ssh-ed25519 \S+ \S+'
    words = re.fullmatch(form, line, re.ASCII)
    assert words is not None
    monkeypatch.delenv("TZ")
    time.tzset()
    left = time.mktime(time.strptime(words[1], "%Y%m%d%H%M")) - time.time()
    assert 3500 < left <= 3600, "it is the local time of the host"
    assert runpy.run_path(words[2])["SERVED"] == (str(folder), 0)


@pytest.mark.parametrize("kind", ["a link", "a link of the folder", "a second name", "no home"])
def test_root_writes_through_no_link_of_the_user(user: pwd.struct_passwd, tmp_path: Path, kind: str) -> None:
    """The target would get the key, and the user as its owner."""
    shadow, home = tmp_path / "shadow", tmp_path / "ops"
    shadow.mkdir()
    (shadow / "authorized_keys").write_text("secret\n")
    before = (shadow / "authorized_keys").stat()
    if kind == "a link of the folder":
        home.mkdir()
        (home / ".ssh").symlink_to(shadow)
        os.chown(home / ".ssh", user.pw_uid, -1, follow_symlinks=False)
    elif kind != "no home":
        (home / ".ssh").mkdir(parents=True)
        make = (
            (home / ".ssh/authorized_keys").symlink_to
            if kind == "a link"
            else (home / ".ssh/authorized_keys").hardlink_to
        )
        make(shadow / "authorized_keys")
    if kind == "a link of the folder" and os.geteuid() != 0:
        pytest.skip("the link belongs to the user who runs this test, as root's would")
    found = _ask(tmp_path, "open")
    assert "problem" in found and "private_key" not in found
    now = (shadow / "authorized_keys").stat()
    assert (shadow / "authorized_keys").read_text() == "secret\n" and home.exists() is (kind != "no home")
    assert (now.st_uid, now.st_mode, now.st_ino) == (before.st_uid, before.st_mode, before.st_ino)
    assert not _ask(tmp_path, "closed", "")["changed"] and not list((tmp_path / "programs").glob("*"))


def test_a_look_takes_back_expired_keys_and_those_of_its_own_hosts_only(
    user: pwd.struct_passwd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "forget_keys", lambda: None)
    (tmp_path / "ops").mkdir()
    for number, asker in enumerate(("gpu-02", "gpu-03", "theirs")):
        _ask(tmp_path, "open", asker, hours=number, most=9)
    assert keys.forget_copies("ops", "2b", ["gpu-03"]) and not keys.forget_copies("ops", "2b", ["gpu-03"])
    assert _marks(tmp_path) == ["mixtral-run-copy-for-1a+theirs"]


def _marks(tmp_path: Path) -> list[str]:
    """The marks of the lines, which are those of the programs."""
    lines = (tmp_path / "ops/.ssh/authorized_keys").read_text().splitlines()
    found = sorted(line.split()[-1] for line in lines)
    assert found == sorted(each.stem for each in (tmp_path / "programs").iterdir())
    return found


def test_a_key_that_is_about_to_be_used_is_its_own_runs_to_take_back(
    user: pwd.struct_passwd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With strategy free, a host that has the image looks for the model while gpu-02 is about to copy the image."""
    monkeypatch.setattr(keys, "forget_keys", lambda: None)
    (tmp_path / "ops").mkdir()
    _ask(tmp_path, "open", "gpu-02")
    assert not keys.forget_copies("ops", "1a", ["gpu-02", "gpu-03"])
    # Another run has another host of this name.
    assert not _ask(tmp_path, "closed", "gpu-02", run_id="2b")["changed"]
    assert _marks(tmp_path) == ["mixtral-run-copy-for-1a+gpu-02"]
    # A killed run's is replaced at once, so that it takes no place, and so is one that an older kit left.
    for run in ("2b", ""):
        assert "private_key" in _ask(tmp_path, "open", "gpu-02", run_id=run, most=1)
    authorized = tmp_path / "ops/.ssh/authorized_keys"
    authorized.write_text(authorized.read_text().replace("for-+", "for-"))
    (program,) = (tmp_path / "programs").iterdir()
    program.rename(program.with_name(program.name.replace("for-+", "for-")))
    assert _marks(tmp_path) == ["mixtral-run-copy-for-gpu-02"]
    assert keys.forget_copies("ops", "1a", ["gpu-02"]) and _marks(tmp_path) == []

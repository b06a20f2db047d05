"""Folders that jobs write and the token they read, whoever logs in; what was there before comes back as it was."""

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.plugins.action import ActionBase

from tests.unit.host.conftest import call_module, load_action, load_module

MODULE = load_module("owned_folders")
# Only root can give a file to another number.
UID, GID = (4321, 4322) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    home = tmp_path / "made" / "home"
    return {
        "record_folder": tmp_path / "records", "section": "hf_cache", "paths": [str(home), str(tmp_path / "there")],
        "uid": UID, "gid": GID, "secret_path": str(home / "token"), "secret": "hf_secret\n",
    }  # fmt: skip


def _figures(path: str | Path) -> tuple[int, int, int]:
    now = Path(path).stat()
    return stat.S_IMODE(now.st_mode), now.st_uid, now.st_gid


def test_the_token_is_read_by_the_group_that_every_job_is_in_and_by_nobody_else(settings: dict) -> None:
    assert call_module(MODULE, **settings)["changed"]
    assert _figures(settings["secret_path"]) == (0o640, UID, GID)
    assert Path(settings["secret_path"]).read_text() == "hf_secret\n"
    assert _figures(settings["paths"][0]) == (0o2775, UID, GID)
    assert not call_module(MODULE, **settings)["changed"]
    Path(settings["secret_path"]).chmod(0o600)
    assert call_module(MODULE, **settings)["done"] == ["wrote " + settings["secret_path"]]
    assert _figures(settings["secret_path"])[0] == 0o640


def test_folders_that_are_not_the_kits_own_are_refused_at_once(settings: dict, tmp_path: Path) -> None:
    """A relative path once ran for ever; with another owner, nobody logs in to a home, and /tmp is closed to all."""
    (tmp_path / "link").symlink_to("/etc")
    paths = ["relative/x", "/", "/tmp/", "/var/../etc", str(tmp_path / "link"), str(Path("~root").expanduser())]
    before = [_figures(path) for path in paths[1:]]
    for check_mode in (True, False):
        given = {**settings, "paths": [*settings["paths"], *paths]}
        refused = call_module(MODULE, **given, _ansible_check_mode=check_mode)
        assert refused["failed"] and all(path in refused["msg"] for path in paths)
        assert settings["paths"][0] not in refused["msg"]
    assert before == [_figures(path) for path in paths[1:]]
    assert not Path(settings["paths"][0]).exists() and not Path("relative").exists()


KEYS = "[default]\naws_access_key_id = AKIDNOBODY\naws_secret_access_key = neverShown"


def test_the_keys_of_a_store_are_kept_as_the_token_and_go_with_it(settings: dict) -> None:
    keys = Path(settings["secret_path"]).with_name("store-credentials")
    given = {**settings, "keys_path": str(keys), "keys": "\ufeff" + KEYS.replace("\n", "\r\n")}
    assert call_module(MODULE, **given)["done"][-1] == f"wrote {keys}"
    assert keys.read_text() == KEYS + "\n" and _figures(keys) == (0o640, UID, GID)
    assert not call_module(MODULE, **given)["changed"]
    changed = call_module(MODULE, **{**given, "keys": KEYS.replace("never", "Never")})
    assert changed["done"] == [f"wrote {keys}"] and "NeverShown" in keys.read_text()
    # Without the file on the operator's machine, what is on the host stays.
    assert not call_module(MODULE, **{**given, "keys": ""})["changed"] and keys.exists()
    for odd in (KEYS.replace("[default]", "[other]"), "AWS_SECRET_ACCESS_KEY=neverShown"):
        refused = call_module(MODULE, **{**given, "secret": "hf_other", "keys": odd})
        assert refused["failed"] and "--store-keys-file" in refused["msg"] and "neverShown" not in refused["msg"]
    assert Path(settings["secret_path"]).read_text() == "hf_secret\n", "nothing is written if one of both is wrong"
    assert f"removed {keys}" in call_module(MODULE, **given, state="absent")["done"] and not keys.exists()


def _moved(settings: dict, tmp_path: Path) -> dict:
    """Return the settings after hf_cache_home was changed."""
    home = tmp_path / "elsewhere"
    paths = {"secret_path": str(home / "token"), "keys_path": str(home / "store-credentials")}
    return {**settings, "paths": [str(home)], "keys": KEYS, **paths}


def _kill_at(function: str, settings: dict) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MODULE, function, end)
        call_module(MODULE, **settings)


@pytest.mark.parametrize("record", ["", "older", "killed"])
def test_a_secret_does_not_stay_where_the_cache_was_before(settings: dict, tmp_path: Path, record: str) -> None:
    token, keys = Path(settings["secret_path"]), Path(settings["secret_path"]).with_name("store-credentials")
    given = {**settings, "keys_path": str(keys), "keys": KEYS}
    call_module(MODULE, **given)
    moved = _moved(settings, tmp_path)
    if record == "older":
        values = json.loads((tmp_path / "records/folders.json").read_text())
        del values["hf_cache"]["sha256"], values["hf_cache"]["former"]
        (tmp_path / "records/folders.json").write_text(json.dumps(values))
    elif record == "killed":
        _kill_at("replace_in", moved)
    # Without the secret, nothing takes the place of the file that is there.
    call_module(MODULE, **{**moved, "secret": "", "keys": ""})
    assert token.exists() and keys.exists()
    expected = [f"removed {token}", f"removed {keys}"]
    assert [each for each in call_module(MODULE, **moved, check_mode=True)["done"] if "removed" in each] == expected
    assert token.exists() and keys.exists()
    assert [each for each in call_module(MODULE, **moved)["done"] if "removed" in each] == expected
    assert not token.exists() and not keys.exists() and Path(moved["secret_path"]).read_text() == "hf_secret\n"
    assert not call_module(MODULE, **moved)["changed"]
    call_module(MODULE, **moved, state="absent")
    assert not Path(moved["secret_path"]).parent.exists() and not token.parent.exists()


def test_a_former_secret_that_is_the_new_one_or_a_users_stays(settings: dict, tmp_path: Path) -> None:
    token, moved = Path(settings["secret_path"]), _moved(settings, tmp_path)
    call_module(MODULE, **settings)
    (tmp_path / "elsewhere").symlink_to(token.parent)
    assert call_module(MODULE, **moved)["done"] == [f"wrote {moved['keys_path']}"]
    assert token.read_text() == "hf_secret\n"
    call_module(MODULE, **settings)
    (tmp_path / "elsewhere").unlink()
    token.write_text("hf_mine\n")
    assert f"removed {token}" not in call_module(MODULE, **moved)["done"] and token.read_text() == "hf_mine\n"


def test_teardown_after_a_killed_run_removes_both(settings: dict, tmp_path: Path) -> None:
    call_module(MODULE, **settings)
    moved = _moved(settings, tmp_path)
    _kill_at("_remove_former", moved)
    assert Path(settings["secret_path"]).exists() and Path(moved["secret_path"]).exists()
    call_module(MODULE, **moved, state="absent")
    assert not Path(settings["secret_path"]).exists() and not Path(moved["secret_path"]).exists()


def test_a_folder_that_was_there_gets_its_owner_and_mode_back_and_the_kits_own_goes(settings: dict) -> None:
    there = Path(settings["paths"][1])
    there.mkdir(mode=0o750)
    there.chmod(0o750)
    before = _figures(there)
    call_module(MODULE, **settings)
    call_module(MODULE, **{**settings, "mode": "2770"})
    assert _figures(there) == (0o2770, UID, GID)
    (there / "mine").write_text("precious")
    assert call_module(MODULE, **settings, state="absent")["changed"]
    assert _figures(there) == before and (there / "mine").read_text() == "precious"
    assert not Path(settings["paths"][0]).parent.exists()
    assert not call_module(MODULE, **settings, state="absent")["changed"]
    assert not list(settings["record_folder"].glob("*"))


def test_what_the_section_left_goes_with_it_whether_or_not_folders_were_recorded(
    settings: dict, tmp_path: Path
) -> None:
    folder, file, kept = tmp_path / "serve-model", tmp_path / "models.json", tmp_path / "kept"
    for made in (folder, kept):
        made.mkdir()
        (made / "inside").touch()
    file.touch()
    (tmp_path / "link").symlink_to(kept)
    leftovers = [str(folder), str(file), str(tmp_path / "link"), str(tmp_path / "never")]
    given = {**settings, "leftovers": leftovers}
    assert "removed " + leftovers[0] not in call_module(MODULE, **given)["done"] and folder.exists()
    (tmp_path / "records/folders.json").unlink()
    assert call_module(MODULE, **given, state="absent", check_mode=True)["changed"] and file.exists()
    assert call_module(MODULE, **given, state="absent")["done"] == [f"removed {path}" for path in leftovers[:3]]
    assert (kept / "inside").exists() and not any(Path(path).exists() for path in leftovers)
    assert not call_module(MODULE, **given, state="absent")["changed"]


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")


@pytest.fixture
def outside(settings: dict, tmp_path: Path) -> Path:
    """Return a folder of root with a file, both of which a user of the host wants to own."""
    folder = tmp_path / "outside"
    folder.mkdir(mode=0o755)
    (folder / "token").write_text("hf_secret\n")
    (folder / "token").chmod(0o600)
    return folder


@AS_ROOT
@pytest.mark.parametrize("place", ["last", "on the way"])
def test_a_link_of_the_folders_owner_is_refused(settings: dict, tmp_path: Path, outside: Path, place: str) -> None:
    link = tmp_path / "hub"
    link.symlink_to(outside if place == "last" else tmp_path)
    os.chown(link, UID, GID, follow_symlinks=False)
    settings["paths"] = [str(link if place == "last" else link / outside.name)]
    before = _figures(outside)
    result = call_module(MODULE, **settings)
    assert result["failed"] and "does not belong to root" in result["msg"] and str(link) in result["msg"]
    assert _figures(outside) == before


def test_a_link_that_root_made_is_followed(settings: dict, tmp_path: Path, outside: Path) -> None:
    (tmp_path / "there").symlink_to(outside.name)
    settings["take_over"] = [str(tmp_path / "there")]
    assert call_module(MODULE, **settings)["changed"]
    assert _figures(outside) == (0o2775, UID, GID)
    assert not call_module(MODULE, **settings)["changed"]


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_the_token_replaces_what_stands_in_its_place(settings: dict, outside: Path, kind: str) -> None:
    token = Path(settings["secret_path"])
    token.parent.mkdir(parents=True)
    if kind == "link":
        token.symlink_to(outside / "token")
    elif kind == "hard link":
        token.hardlink_to(outside / "token")
    else:
        os.mkfifo(token)
    before = _figures(outside / "token")
    settings["take_over"] = settings["paths"]
    assert f"wrote {token}" in call_module(MODULE, **settings)["done"]
    assert token.is_file() and not token.is_symlink() and _figures(token) == (0o640, UID, GID)
    assert _figures(outside / "token") == before


def test_the_owner_is_set_on_the_file_that_was_written(
    settings: dict, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user replaces the temporary file by a link just before its owner is set by name."""
    change = os.chown

    def race(path: str | int, *args: int, **options: bool) -> None:
        if ".mixtral-run-" in str(path):
            Path(path).unlink()
            Path(path).symlink_to(outside / "token")
        change(path, *args, **options)

    monkeypatch.setattr(os, "chown", race)
    before = _figures(outside / "token")
    call_module(MODULE, **settings)
    assert _figures(outside / "token") == before


@AS_ROOT
def test_what_is_taken_back_is_not_reached_by_a_link(settings: dict, outside: Path) -> None:
    there = Path(settings["paths"][1])
    there.mkdir()
    settings["secret_path"] = str(there / "token")
    call_module(MODULE, **settings)
    (there / "token").unlink()
    there.rmdir()
    there.symlink_to(outside)
    os.chown(there, UID, GID, follow_symlinks=False)
    before = _figures(outside)
    call_module(MODULE, **settings, state="absent")
    assert (outside / "token").exists() and _figures(outside) == before


def test_what_a_failing_python_prints_of_its_input_reaches_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text('\ufeff"hf_printedBack"\r\n')
    (tmp_path / "keys").write_text(KEYS)
    sent = {}

    def print_input(_self: object, module_args: dict, task_vars: object) -> dict:
        sent.update(module_args)
        return {
            "failed": True,
            "rc": 1,
            "module_stdout": f"params='{json.dumps(module_args)}'",
            "module_stderr": "no zip",
        }

    plugin = load_action("owned_folders").ActionModule
    monkeypatch.setattr(ActionBase, "run", lambda *_: {"changed": False})
    monkeypatch.setattr(plugin, "_execute_module", print_input)
    action = object.__new__(plugin)
    action._task = SimpleNamespace(
        args={"section": "x", "secret_file": str(tmp_path / "token"), "keys_file": str(tmp_path / "keys")}
    )
    answer = action.run()
    assert "hf_printedBack" in sent["secret"] and "secret_file" not in sent
    assert sent["keys"] == KEYS
    assert not [word for word in ("hf_printedBack", "AKIDNOBODY", "neverShown") if word in str(answer)]
    assert answer["module_stderr"] == "no zip" and '"section": "x"' in answer["module_stdout"]


def test_only_secrets_of_the_keys_are_hidden() -> None:
    plugin = load_action("owned_folders")
    text = (
        "# keys of ops, until May\n; more\n[default]\naws_access_key_id: AKIDNOBODY\naws_secret_access_key : S3=:crt\n"
        "aws_session_token=short\nregion = eu\nretries = 1\ns3 =\n    style = path\nnone:longEnoughValue\n"
        "neverShownLine\nodd\n"
    )
    secrets = ["AKIDNOBODY", "S3=:crt", "short", "longEnoughValue", "neverShownLine"]
    assert plugin._parts(text) == secrets
    message = "1 file of keys of ops; region eu; style path; odd"
    assert plugin._without({"msg": message, "rc": 1}, secrets) == {"msg": message, "rc": 1}

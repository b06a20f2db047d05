"""Folders of somebody else are not taken over, and a cache on a disk that outlived the system is used again."""

import os
import stat
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("owned_folders")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another number")
UID, GID, OTHER = 4321, 4322, 5000
WORDS = "owner 4321, group 4322, mode 2775"


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    paths = [str(tmp_path / "home"), str(tmp_path / "checkpoints")]
    return {"record_folder": tmp_path / "records", "section": "hf_cache", "paths": paths, "uid": UID, "gid": GID}


def _folder(path: str, uid: int, mode: int = 0o755, file: str | None = "model") -> Path:
    made = Path(path)
    made.mkdir()
    if file:
        (made / file).touch()
    os.chown(made, uid, uid)
    made.chmod(mode)
    return made


def _figures(path: Path) -> tuple[int, int, int]:
    now = path.stat()
    return now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)


@pytest.mark.parametrize("check_mode", [True, False])
def test_all_folders_of_somebody_else_are_refused_before_one_is_made(
    settings: dict, tmp_path: Path, check_mode: bool
) -> None:
    used = _folder(settings["paths"][1], OTHER)
    settings["paths"].append(str(_folder(str(tmp_path / "roots"), 0)))
    refused = call_module(MODULE, **settings, check_mode=check_mode)
    assert refused["failed"] and f"{used}: owner 5000, group 5000, mode 0755; " in refused["msg"]
    assert "roots: owner 0 (root), group 0 (root), mode 0755" in refused["msg"]
    assert "expected: an empty folder, or one of user 4321\n" in refused["msg"]
    assert f'-e \'{{"hf_cache_take_over": ["{used}", ' in refused["msg"]
    assert _figures(used) == (OTHER, OTHER, 0o755) and not Path(settings["paths"][0]).exists()


def test_a_folder_that_is_named_is_taken_over_and_the_record_allows_it_from_then_on(settings: dict) -> None:
    used = _folder(settings["paths"][1], OTHER)
    given = {**settings, "take_over": [f"{used}/"]}
    for check_mode in (True, False):
        taken = call_module(MODULE, **given, check_mode=check_mode)
        change = f"{used}: owner 5000, group 5000, mode 0755 → {WORDS}"
        assert taken["shown"] == [change]
        assert [each["before"] for each in taken["diff"]] == ["", "owner 5000\ngroup 5000\nmode 0755\n"]
        assert {each["after"] for each in taken["diff"]} == {WORDS.replace(", ", "\n") + "\n"}
    assert _figures(used) == (UID, GID, 0o2775) and not call_module(MODULE, **settings)["changed"]
    # The kit's own folders follow a changed setting.
    (Path(settings["paths"][0]) / "model").touch()
    assert call_module(MODULE, **{**settings, "uid": UID + 1})["changed"]
    assert _figures(used)[0] == UID + 1 and _figures(Path(settings["paths"][0]))[0] == UID + 1
    back = call_module(MODULE, **settings, state="absent")
    assert back["shown"] == [f"{used}: owner 4322, group 4322, mode 2775 → owner 5000, group 5000, mode 0755"]


def test_the_cache_on_a_disk_that_outlived_the_system_is_used_again(settings: dict) -> None:
    call_module(MODULE, **settings)
    for path in settings["paths"]:
        (Path(path) / "model").touch()
    (settings["record_folder"] / "folders.json").unlink()
    assert not call_module(MODULE, **settings)["changed"]
    # Another number than before is a change of somebody's data, as far as the new system knows.
    assert call_module(MODULE, **{**settings, "uid": UID + 1})["failed"]


@pytest.mark.parametrize("file", [None, "lost+found"])
def test_an_empty_folder_and_a_new_disk_are_taken(settings: dict, file: str | None) -> None:
    empty = _folder(settings["paths"][0], 0, file=file)
    taken = call_module(MODULE, **settings)
    assert taken["shown"] == [f"{empty}: owner 0 (root), group 0 (root), mode 0755 → {WORDS}"]
    assert _figures(empty) == (UID, GID, 0o2775)


def test_a_private_folder_of_whoever_has_the_number_is_not_opened_to_all(settings: dict) -> None:
    private = _folder(settings["paths"][0], UID, 0o700)
    refused = call_module(MODULE, **settings)
    assert refused["failed"] and "keeps other users out" in refused["msg"] and _figures(private)[2] == 0o700
    assert call_module(MODULE, **{**settings, "mode": "2770"})["changed"] and _figures(private) == (UID, GID, 0o2770)

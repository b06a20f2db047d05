"""A model that lies in a folder of the host is taken from there, by whatever links it is reached."""

import hashlib
import os
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("hf_model")


def _take(tmp_path: Path, source: Path) -> dict:
    return call_module(
        MODULE, tmp_path / "records", host="gpu-01", home=str(tmp_path / "home"), model="org/model",
        patterns=["*.json"], source_path=str(source), uid=os.geteuid(), gid=os.getegid(),
    )  # fmt: skip


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A folder with a model, reached by a link above it, as a mounted share often is."""
    (tmp_path / "mnt/disk-7/model").mkdir(parents=True)
    (tmp_path / "mnt/disk-7/model/config.json").write_text("{}")
    (tmp_path / "share").symlink_to("mnt/disk-7")
    return tmp_path / "share/model"


def test_links_above_a_folder_and_to_its_files_are_followed(share: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text("[]")
    (share / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    (share / "quantised-fp8").mkdir()
    (share / "quantised-fp8/mixtral_run.json").write_text("experts that finetune keeps there are no part of the model")
    result = _take(tmp_path, share)
    assert not result.get("failed"), result
    snapshot = tmp_path / "home/hub/models--org--model/snapshots" / result["commit"]
    assert {path.name: path.read_text() for path in snapshot.iterdir()} == {"config.json": "{}", "tokenizer.json": "[]"}
    assert not _take(tmp_path, share)["changed"]


def test_a_damaged_blob_of_a_cache_is_reported(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--model"
    blob = cache / "blobs" / hashlib.sha256(b"whole").hexdigest()
    snapshot = cache / "snapshots" / ("c" * 40)
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_text("broken")
    (snapshot / "config.json").symlink_to(blob)
    result = _take(tmp_path, cache)
    assert result["failed"] and f"{blob} is damaged" in result["msg"]


def test_a_look_reports_what_the_host_has_and_downloads_nothing(share: Path, tmp_path: Path) -> None:
    given = {"host": "gpu-01", "home": str(tmp_path / "home"), "model": "org/model", "patterns": ["*.json"],
             "uid": os.geteuid(), "gid": os.getegid(), "via": "look", "user": "no-such-user"}  # fmt: skip
    assert call_module(MODULE, tmp_path / "records", check_mode=True, **given, source_path=str(share))["changed"]
    assert not (tmp_path / "home").exists() and not (tmp_path / "records").exists()
    before = call_module(MODULE, tmp_path / "records", **given)
    assert not before["spread"]["holds"] and before["msg"] == "it does not have org/model"
    _take(tmp_path, share)
    after = call_module(MODULE, tmp_path / "records", **given)["spread"]
    digest = hashlib.sha256(b"{}").hexdigest()
    assert after["holds"] and after["content"]["files"] == [["config.json", 2, digest]]
    # The commit's name is not part of it: the hub's differs from a folder's.
    assert after["key"] == "sha256:" + hashlib.sha256(f"{digest} config.json\n".encode()).hexdigest()
    # A peer that the operator named may have it from something else than the kit.
    (tmp_path / "records/hf_models.json").unlink()
    assert call_module(MODULE, tmp_path / "records", **given | {"via": "visit"})["spread"]["key"] == after["key"]
    (tmp_path / "home/hub/models--org--model/blobs" / ("a" * 64 + ".incomplete")).touch()
    assert not call_module(MODULE, tmp_path / "records", **given | {"via": "visit"})["spread"]["holds"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"commit": "c" * 40, "files": [["../../etc/x", 1, "a" * 64]]}, "it lists"),
        ({"commit": "c" * 40, "files": [["x", 1, "../x"]]}, "it lists"),
        ({"commit": "../x", "files": []}, "it names the commit"),
        ({"commit": "c" * 40, "files": {"x": 1}}, "no list of files"),
        ({}, "no list of files"),
    ],
)
def test_names_that_a_hostile_host_reported_are_refused(tmp_path: Path, content: dict, words: str) -> None:
    result = call_module(
        MODULE, tmp_path / "records", host="gpu-02", home=str(tmp_path / "home"), model="org/model", patterns=["*"],
        via="peer", peer="gpu-01", content=content, uid=os.geteuid(), gid=os.getegid(),
    )  # fmt: skip
    assert result["failed"] and "gpu-01: " in result["msg"] and words in result["msg"]
    assert not (tmp_path / "home").exists()

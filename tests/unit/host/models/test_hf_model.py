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

"""Readings of a host's folders: nothing in a folder hides the rest of the host's state."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.status import remote_status
from mixtral_run.fleet.status.remote_status import cached_models, checkpoints
from mixtral_run.fleet.untrusted import parse_json

MARKER = "latest_checkpointed_iteration.txt"
SOUND = {"kind": "adapter", "base": {"fingerprint": "ab"}, "architecture": {"num_layers": 2, "eps": 1e-5, "sizes": [1]}}


def write(folder: Path, marker: str = "7", record: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(marker)
    if record is not None:
        (folder / "mixtral_run.json").write_text(record)
    return folder


def read(folder: Path) -> Any:
    """Return the checkpoints and adapters as they arrive on the other side. A reading that hangs fails the test."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(json.dumps(checkpoints(str(folder)))), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "the reading hangs or failed"
    return parse_json(found[0])


def test_sound_folders_are_read(tmp_path: Path) -> None:
    write(tmp_path / "base", "0\n")
    write(tmp_path / "runs/adapter", record=json.dumps(SOUND))
    write(tmp_path / "iteration", "3")
    (tmp_path / "iteration/iter_0000003").mkdir()
    (tmp_path / "iteration/iter_0000003/mixtral_run.json").write_text('{"fingerprint": "cd"}')
    bases, adapters = read(tmp_path)
    assert sorted(bases, key=lambda entry: entry["iteration"]) == [
        {"path": str(tmp_path / "base"), "iteration": 0, "architecture": {}, "fingerprint": None},
        {"path": str(tmp_path / "iteration"), "iteration": 3, "architecture": {}, "fingerprint": "cd"},
    ]
    assert adapters == [
        {
            "path": str(tmp_path / "runs/adapter"),
            "iteration": 7,
            "architecture": SOUND["architecture"],
            "fingerprint": "ab",
        }
    ]


@pytest.mark.parametrize(
    "record",
    [
        "[1]", '"x"', "7", '{"base": "x"}', '{"base": [1]}', '{"architecture": "x"}', "[" * 100_000,
        '{"architecture": ' + '{"a":' * 900 + "1" + "}" * 901, '{"fingerprint": {"a": 1}}',
        '{"architecture": {"eps": NaN}}', '{"architecture": {"eps": 1e999}}',
        '{"architecture": {"a": 1' + "0" * 400 + "}}",
        '{"architecture": {"a": [[1]]}}', '{"kind": "adapter"}' + " " * (1 << 21),
    ],
)  # fmt: skip
def test_an_odd_record_hides_only_its_own_folder(record: str, tmp_path: Path) -> None:
    write(tmp_path / "odd", record=record)
    write(tmp_path / "sound", record=json.dumps(SOUND))
    bases, adapters = read(tmp_path)
    assert bases == [] and [entry["path"] for entry in adapters] == [str(tmp_path / "sound")]


@pytest.mark.parametrize("record", ["[]", "null", '{"kind": ["adapter"], "base": null}'])
def test_a_record_without_content_counts_as_none(record: str, tmp_path: Path) -> None:
    write(tmp_path / "odd", record=record)
    bases, adapters = read(tmp_path)
    assert [entry["path"] for entry in bases] == [str(tmp_path / "odd")] and adapters == []


@pytest.mark.parametrize("marker", ["", "x", "-1", "9" * 13, "9" * 5000, "7" + " " * 100_000])
def test_an_odd_marker_hides_only_its_own_folder(marker: str, tmp_path: Path) -> None:
    write(tmp_path / "odd", marker)
    write(tmp_path / "sound")
    bases, _ = read(tmp_path)
    assert [entry["path"] for entry in bases] == [str(tmp_path / "sound")]


@pytest.mark.parametrize("name", [MARKER, "mixtral_run.json"])
def test_a_named_pipe_does_not_block(name: str, tmp_path: Path) -> None:
    odd = write(tmp_path / "odd", record="{}")
    (odd / name).unlink()
    os.mkfifo(odd / name)
    write(tmp_path / "sound")
    bases, _ = read(tmp_path)
    assert [entry["path"] for entry in bases] == [str(tmp_path / "sound")]


def test_the_number_of_entries_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_status, "MAX_ENTRIES", 3)
    for number in range(5):
        write(tmp_path / f"c/{number}")
        (tmp_path / f"hub/models--a--{number}/snapshots/1").mkdir(parents=True)
    assert len(read(tmp_path / "c")[0]) == 3
    assert cached_models(str(tmp_path)) == ["a/0", "a/1", "a/2"]


def test_folders_and_markers_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "base")
    write(tmp_path / "other")
    (tmp_path / "private").mkdir()
    scan, open_file = os.scandir, os.open
    closed = {str(tmp_path / "private"), str(tmp_path / "other" / MARKER)}

    def refuse(path: Any) -> None:
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: (refuse(path), scan(path))[1])
    monkeypatch.setattr(os, "open", lambda path, *more, **named: (refuse(path), open_file(path, *more, **named))[1])
    found: list[str] = []
    bases, _ = checkpoints(str(tmp_path), unreadable=found)
    assert [entry["path"] for entry in bases] == [str(tmp_path / "base")] and set(found) == closed

"""A marker or proof from anybody names files of its own folder, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral_run.errors import WeightsError
from mixtral_run.weights.adapter.checkpoint import open_adapter
from mixtral_run.weights.manifest.checkpoint_folder import LATEST, iteration_of, newest_iteration, open_checkpoint
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from mixtral_run.weights.manifest.proof import PROOF_NAME, check_files


@pytest.mark.parametrize(
    "marker", ["", "9" * 5000, "9" * 19, "/etc", "..", "../..", ".", "iter_abc", "iter_", "-5", "\x1b[2J", "١"]
)
def test_a_marker_that_names_no_iteration_is_refused(tmp_path: Path, marker: str) -> None:
    (tmp_path / LATEST).write_text(marker, encoding="utf-8")
    (tmp_path / "iter_abc").mkdir()
    with pytest.raises(WeightsError, match="marker is damaged") as caught:
        newest_iteration(tmp_path)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("marker", "name"), [("release", "release"), ("12\n", "iter_0000012"), ("iter_0000012", "iter_0000012")]
)
def test_a_marker_names_an_iteration(tmp_path: Path, marker: str, name: str) -> None:
    (tmp_path / LATEST).write_text(marker)
    (tmp_path / name).mkdir()
    assert newest_iteration(tmp_path) == tmp_path / name


@pytest.mark.parametrize(("name", "number"), [("iter_0000012", 12), ("release", 0), ("iter_abc", 0), ("12", 0)])
def test_the_number_of_a_folder(name: str, number: int) -> None:
    assert iteration_of(Path("base") / name) == number


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000 + "]" * 100_000,
        json.dumps({"files": {"/etc/hostname": "0"}}),
        json.dumps({"files": {"../other": "0"}}),
        json.dumps({"files": {"a\x1b[2J": "0"}}),
    ],
    ids=["nested", "absolute", "parent", "control"],
)
def test_a_proof_names_files_of_its_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / PROOF_NAME).write_text(content)
    with pytest.raises(WeightsError, match="proof cannot be read") as caught:
        check_files(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_a_file_that_a_proof_names_is_checked(tmp_path: Path) -> None:
    (tmp_path / PROOF_NAME).write_text(json.dumps({"files": {"tokenizer.json": "0", "gone": "0"}}))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert [line.split(":")[0] for line in check_files(tmp_path)] == ["tokenizer.json", "gone"]


def test_a_missing_folder_is_told_by_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="There is no such folder") as base:
        describe_base(tmp_path / "nothing")
    assert "an HF model's directory" in str(base.value.expected) and "finetune" not in str(base.value.next_command)
    for describe in (describe_adapter, open_adapter):
        with pytest.raises(WeightsError, match="There is no such folder") as adapter:
            describe(tmp_path / "nothing")
        assert "HF" not in str(adapter.value.expected) and "convert" not in str(adapter.value.next_command)
    with pytest.raises(WeightsError, match="This is not a whole checkpoint") as either:
        open_checkpoint(tmp_path)
    assert "convert" in str(either.value.next_command) and "finetune" in str(either.value.next_command)

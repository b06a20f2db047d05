"""A folder of another kind than the flag takes is named, with the flag that takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_run.errors import WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.checkpoint import open_adapter
from mixtral_run.weights.manifest.base_checkpoint import open_base
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from mixtral_run.weights.manifest.folder_kind import ADAPTER, BASE, HF_MODEL, PEFT, kind_of


def write(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    return folder


LATEST = "latest_checkpointed_iteration.txt"
FILES = {
    BASE: ("mixtral_run.json", LATEST, "iter_0000001/.metadata", "tokenizer/tokenizer.json"),
    ADAPTER: (LATEST, "metrics.jsonl", "iter_0000001/.metadata", "iter_0000001/mixtral_run.json"),
    HF_MODEL: ("config.json", "model.safetensors.index.json"),
    PEFT: ("adapter_config.json", "adapter_model.safetensors", "mixtral_run.json"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_is_recognized(kind: str, tmp_path: Path) -> None:
    assert kind_of(write(tmp_path, *FILES[kind])) == kind


def test_other_folders_are_not_judged(tmp_path: Path) -> None:
    assert kind_of(tmp_path / "none") is None
    assert kind_of(tmp_path) is None
    assert kind_of(write(tmp_path / "megatron", LATEST, "iter_0000001/.metadata")) is None
    adapter = write(tmp_path / "adapter", *FILES[ADAPTER])
    assert kind_of(adapter / "iter_0000001") == ADAPTER
    # A merged model that kept the adapter's settings is a model.
    assert kind_of(write(tmp_path / "merged", *FILES[HF_MODEL], "adapter_config.json")) == HF_MODEL


def as_base(folder: Path) -> object:
    return open_base(folder, None, Report.silent())


@pytest.mark.parametrize(
    ("read", "kind", "flag", "advice"),
    [
        (describe_base, ADAPTER, "--load", "--load BASE, the base that it was trained on; generate takes the adapter"),
        (describe_base, PEFT, "--load", "--init-adapter"),
        (describe_adapter, BASE, "--adapter", "--load "),
        (describe_adapter, HF_MODEL, "--adapter", "--load "),
        (describe_adapter, PEFT, "--adapter", "mixtral-run finetune --save FOLDER"),
        (open_adapter, BASE, "--adapter", "--load "),
        (open_adapter, PEFT, "--adapter", "mixtral-run finetune --save FOLDER"),
        (
            lambda path: open_base(path, None, Report.silent()),
            ADAPTER,
            "--from-megatron",
            "--from-megatron BASE --adapter",
        ),
        (as_base, HF_MODEL, "--from-megatron", "--hf-model-path "),
    ],
)
def test_the_wrong_kind_is_refused_with_the_flag_that_takes_it(
    read: Callable[[Path], object], kind: str, flag: str, advice: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, *FILES[kind])
    with pytest.raises(WeightsError) as caught:
        read(folder)
    assert caught.value.what.startswith(f"This is {kind}, not ")
    assert caught.value.where == f"{flag} {folder}"
    assert advice in str(caught.value.next_command)

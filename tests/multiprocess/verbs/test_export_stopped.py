"""Ctrl-C during a merge keeps the files that are finished; the same command continues and ends with the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter import merge
from mixtral_run.weights.adapter.export import export
from tests.multiprocess.verbs.test_export import write_adapter
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.support.tiny import write_tiny

NUM_FILES = 3


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "hf", num_shards=NUM_FILES)
    convert_quietly(tmp_path / "hf", tmp_path / "base", 1, 1)
    write_adapter(tmp_path, tmp_path / "adapter", ("linear_qkv", "linear_fc1"))
    return tmp_path


def merged(made: Path, output: str) -> dict[str, bytes]:
    config = ExportConfig(
        adapter=(str(made / "adapter"),),
        hf_model_path=made / "hf",
        output_path=made / output,
        merge=True,
        overwrite=True,
    )
    export(config, Report.silent())
    assert not (made / output / "merge.jsonl").exists()
    return {each.name: each.read_bytes() for each in (made / output).glob("model*")}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, most: int) -> Iterator[list[str]]:
    """Yield the names of the files that are merged; Ctrl-C comes in place of one more than `most`."""
    merge_file, names = merge._merge_file, []

    def merged_or_interrupted(weights: Any, factors: Any, file: Path, *more: Any) -> dict[str, int]:
        if len(names) == most:
            raise KeyboardInterrupt
        names.append(file.name)
        return merge_file(weights, factors, file, *more)

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_merge_file", merged_or_interrupted)
        yield names


@pytest.mark.parametrize("damaged", [False, True])
def test_finished_files_are_not_merged_again(made: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    whole = merged(made, "whole")
    earlier = merged(made, "out")
    with counted(monkeypatch, 2) as names, pytest.raises(KeyboardInterrupt):
        merged(made, "out")
    first = made / ".out.unfinished" / names[0]
    assert {each.name: each.read_bytes() for each in (made / "out").glob("model*")} == earlier
    if damaged:
        content = bytearray(first.read_bytes())
        content[-1] ^= 1
        first.write_bytes(content)
    with counted(monkeypatch, NUM_FILES) as names:
        assert merged(made, "out") == whole
    assert len(names) == (2 if damaged else 1) and (first.name in names) == damaged
    assert not (made / ".out.unfinished").exists()


def test_another_adapter_begins_anew(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        merged(made, "out")
    manifest = next((made / "adapter").glob("iter_*/mixtral_run.json"))
    values = manifest.read_text()
    manifest.write_text(values.replace('"lora_alpha": ', '"lora_alpha": 1').replace('"crc32"', '"was"'))
    with counted(monkeypatch, NUM_FILES) as names:
        merged(made, "out")
    assert len(names) == NUM_FILES

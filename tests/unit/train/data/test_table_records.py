"""Parquet, Arrow, Zstandard, saved datasets, folders and the hub, written by pyarrow and datasets themselves."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.data_sources import parse_source
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.data_files import files_of, split_of
from mixtral_run.train.data.reading.examples import read_examples
from mixtral_run.train.data.reading.records import Record
from tests.support.examples import turns_of
from tests.support.servers.dataset_hub import COMMIT, NAME, serving_dataset

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": f"b{n}", "weight": n % 2}]}
    for n in range(600)
] + [{"messages": None, "instruction": "c", "response": "d"}]


def records(path: Path) -> list[Any]:
    (file,) = files_of(parse_source(str(path)), "here").files
    found = list(file.records("here"))
    assert all(isinstance(each, Record) for each in found)
    return found


def table() -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist([{"instruction": None, "response": None, **row} for row in ROWS])


def write(path: Path, kind: str) -> None:
    import pyarrow.feather
    import pyarrow.parquet

    if kind == "parquet":
        pyarrow.parquet.write_table(table(), path, row_group_size=100)
    elif kind == "feather":
        pyarrow.feather.write_feather(table(), str(path), compression="zstd")
    else:
        opened = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with opened(str(path), table().schema) as writer:
            writer.write_table(table(), max_chunksize=70)


@pytest.mark.parametrize("kind", ["parquet", "feather", "file", "stream"])
def test_tables_are_read_by_content(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "data", kind)
    found = records(tmp_path / "data")
    expected = [{key: value for key, value in row.items() if value is not None} for row in ROWS]
    assert [each.values for each in found] == expected
    assert [found[0].place, found[-1].place] == ["row 1", "row 601"]
    # A weight of 0 leaves nothing to learn: every other conversation.
    with pytest.raises(ConfigError, match="300 of 601"):
        read_examples([str(tmp_path / "data")]).check()


def test_a_table_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    for kind in ("parquet", "file", "stream"):
        write(tmp_path / "whole", kind)
        content = (tmp_path / "whole").read_bytes()
        (tmp_path / "cut").write_bytes(content[: len(content) // 2])
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            records(tmp_path / "cut")
        assert caught.value.where == "here"


def test_zstandard_is_read_with_several_frames(tmp_path: Path) -> None:
    import pyarrow

    lines = "\n".join(json.dumps(row) for row in ROWS[:9]).encode()
    frames = [pyarrow.compress(part, codec="zstd", asbytes=True) for part in (lines[:50], lines[50:])]
    (tmp_path / "data.jsonl.zst").write_bytes(b"".join(frames))
    assert [each.values for each in records(tmp_path / "data.jsonl.zst")] == ROWS[:9]
    (tmp_path / "data.jsonl.zst").write_bytes(b"".join(frames)[:-9])
    with pytest.raises(ConfigError, match="cut off or damaged"):
        records(tmp_path / "data.jsonl.zst")


def test_a_compressed_table_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    import gzip

    write(tmp_path / "data", "parquet")
    packed = tmp_path / "data.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "data").read_bytes()))
    with pytest.raises(ConfigError, match="read at any place") as caught:
        records(packed)
    assert caught.value.next_command == f"gzip -dk {packed}, then the unpacked file"


def test_saved_datasets_and_their_splits_are_read(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"question": f"a{n}", "answer": "b"} for n in range(5)])
    # A selection is saved as it is, in another order than its file's.
    rows.select([4, 0, 2]).save_to_disk(str(tmp_path / "one"))
    assert [each.values["question"] for each in records(tmp_path / "one")] == ["a4", "a0", "a2"]
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "both"))
    found = files_of(parse_source(str(tmp_path / "both")), "here")
    assert (found.files[0].path, found.left_out) == (tmp_path / "both/train", "reads the split train, not test")
    stream = read_examples([f"{tmp_path / 'both'}:test"])
    assert [turns_of(each) for each in stream] == [[("a1", "b")]]
    with pytest.raises(ConfigError, match="no such split"):
        read_examples([f"{tmp_path / 'both'}:dev"]).check()


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("question,answer\nc,d\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.json").write_text('[{"question": "e", "answer": "f"}, {"question": "g"}]')
    write(tmp_path / "a.parquet", "parquet")
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS"):
        (tmp_path / name).write_text("no data")
    assert [file.name for file in files_of(parse_source(str(tmp_path)), "").files] == [
        "a.parquet",
        "b.csv",
        "sub/c.json",
    ]
    with pytest.raises(ConfigError) as caught:
        read_examples([f"{tmp_path}"]).check()
    assert caught.value.problems[0].startswith(
        "row 1 of a.parquet: 'messages': expected an answer that counts in the loss"
    )
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigError) as caught:
        read_examples([f"{tmp_path}"]).check()
    assert caught.value.problems == ("entry 2 (line 1) of sub/c.json: the keys fit no shape: 'question'; question needs"
                                     " 'answer'",)  # fmt: skip
    for file in ("b.csv", "sub/c.json"):
        (tmp_path / file).unlink()
    with pytest.raises(ConfigError, match="The folder holds no data"):
        read_examples([str(tmp_path)]).check()


def test_of_a_folder_with_splits_train_is_read(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text(json.dumps({"question": name, "answer": "b"}))
    stream = read_examples([str(tmp_path)])
    assert [turns_of(each)[0][0][:8] for each in stream] == ["train-00", "train-00"]
    assert "2 files are left out: test-00000.jsonl, valid.jsonl" in stream.remarks()[0]
    assert [turns_of(each)[0][0] for each in read_examples([f"{tmp_path}:validation"])] == ["valid.jsonl"]
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="several splits, none of which is 'train'"):
        read_examples([str(tmp_path)]).check()


@pytest.mark.parametrize(
    ("name", "split"),
    [("train.jsonl", "train"), ("data/test-00000.parquet", "test"), ("my_dev.csv", "validation"), ("trains.csv", None),
     ("constraint.csv", None), ("x/val/0.jsonl", "validation")],
)  # fmt: skip
def test_names_tell_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_without_the_packages_the_message_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", "parquet")
    (tmp_path / "data.zst").write_bytes(b"\x28\xb5\x2f\xfd....")
    really = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(f"No module named {name!r}")
        return really(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for text in (str(tmp_path / "data"), str(tmp_path / "data.zst"), "owner/name"):
        with pytest.raises(ConfigError, match="needs packages that are not installed") as caught:
            read_examples([text]).check()
        assert "pip install 'mixtral-run[data]'" in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_dataset_on_the_hub_is_checked_by_its_name(tmp_path: Path) -> None:
    """Also: the second time, the hub is not reached."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "data/train.jsonl").write_text('{"question": "a", "answer": "b", "id": 1}\n')
    (folder / "data/test.jsonl").write_text('{"question": "t", "answer": "u"}\n')
    words = [sys.executable, "-m", "mixtral_run", "data", "check", "--json"]
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": "",
    }  # fmt: skip

    def check(text: str, **more: str) -> Any:
        done = subprocess.run([*words, text], capture_output=True, text=True, env=environment | more, check=False)
        return done.returncode, json.loads(done.stdout), done.stderr

    with serving_dataset(folder) as hub:
        code, found, _ = check(NAME, HF_ENDPOINT=hub.url)
        assert (code, found["counts_by_shape"], found["unused_keys"]) == (0, {"question": 1}, {"id": 1})
        assert any(COMMIT in path for path in hub.paths)
        code, found, errors = check(f"{NAME}@nowhere:train", HF_ENDPOINT=hub.url)
        assert code == 2 and "Revision 'nowhere' doesn't exist" in errors and "Traceback" not in errors
        assert not found["ok"]
    code, found, errors = check(NAME, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert (code, found["num_examples"]) == (0, 1), errors

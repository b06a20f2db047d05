"""What would be lost or wrong without a word: duplicate keys, files of folders, renamed keys, spans that overlap."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mixtral_run.config.data import CheckConfig, DataConfig
from mixtral_run.config.data_sources import source_problems
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.cache import content_hash
from mixtral_run.train.data.cache.content_hash import file_sha256, refuse_changed
from mixtral_run.train.data.check.check import check_data
from mixtral_run.train.data.check.check_encoding import CheckEncoding
from mixtral_run.train.data.reading.data_files import DataFile, files_of
from mixtral_run.train.data.reading.example import ASSISTANT, USER, Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.sources import _overlap
from mixtral_run.train.data.templates.open_template import open_chat_template
from mixtral_run.train.run_checkpoints import changed_order

GOOD = '{"instruction": "a", "response": "b"}\n'
TWICE = '{"instruction": "a", "response": "b", "response": "c"}'


def refused(*paths: Path, setting: str = "data_path", **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_examples(map(str, paths), ReadOptions(**options), setting).check()
    return str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", f"{GOOD}{TWICE}\n"), ("a.json", f"[\n{TWICE}]")])
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    text = refused(path)
    assert "the key 'response' is there twice" in text and "line 2" in text
    path.write_text('{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}')
    assert "the key 'role' is there twice" in refused(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_columns_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array([text]) for text in ("one", "two", "r")]
    table = pyarrow.Table.from_arrays(columns, names=["instruction", "instruction", "response"])
    path = tmp_path / "data"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with (pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream)(str(path), table.schema) as writer:
            writer.write_table(table)
    text = refused(path)
    assert "columns of the same name" in text and "'instruction'" in text


def _dangling(path: Path) -> None:
    path.symlink_to("/nonexistent/file")


@pytest.mark.parametrize(("make", "found"), [(_dangling, "a link to a file"), (os.mkfifo, "not a file")])
def test_a_folder_with_data_that_cannot_be_read_is_refused(
    tmp_path: Path, make: Callable[[Path], None], found: str
) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    make(tmp_path / "b.jsonl")
    assert f"b.jsonl: {found}" in refused(tmp_path)


def test_what_a_folder_holds_beside_data_is_reported(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    other.mkdir()
    (other / "b.jsonl").write_text(GOOD)
    (data / "a.jsonl").write_text(GOOD)
    (data / "notes.txt").write_text("x")
    (data / "linked").symlink_to(other)
    (data / ".hidden.jsonl").write_text(GOOD)
    stream = read_examples([str(data)])
    assert len(list(stream)) == 1
    note = "holds names that are not of files of data; 2 files are left out: linked/, notes.txt."
    assert stream.remarks() == [f"{data} {note}"]


def test_an_empty_file_among_several_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text("\n")
    (tmp_path / "c.csv").write_text("instruction,response\n")
    stream = read_examples([str(tmp_path)])
    assert len(list(stream)) == 1 and stream.remarks() == ["2 files without a record: b.jsonl, c.csv."]


def test_a_field_that_no_record_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "response": "own", "Solution": "x"}\n')
    text = refused(path, fields={"response": "solution"})
    assert "--field response=solution: found no key 'solution'" in text
    # A record of another source may have it.
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "solution": "s"}\n')
    stream = read_examples([str(path), str(tmp_path / "b.jsonl")], ReadOptions(fields={"response": "solution"}))
    assert [each.messages[1].content for each in stream] == ["own", "s"]
    # The validation set may use the kit's own names where the training data do not.
    assert list(read_examples([str(path)], ReadOptions(fields={"response": "solution"}), "valid_data_path"))


def test_errors_of_reading_name_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    (file,) = files_of(read_examples([str(path)]).sources[0], "data").files
    sha256 = file_sha256(path, None)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        list(DataFile(file.source, path, "a").records("data"))
    with pytest.raises(ConfigError, match="cannot be read"):
        refuse_changed(path, sha256)


def test_a_cache_that_may_only_be_read_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_hash, "HASHED_ALWAYS", 0)
    monkeypatch.setattr(content_hash, "SPOT_BYTES", 4)
    monkeypatch.setattr(content_hash, "SETTLED_SECONDS", -10.0)
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    (tmp_path / "cache" / content_hash.INDEX_NAME).mkdir(parents=True)  # The index cannot take its place.
    assert file_sha256(path, tmp_path / "cache") == file_sha256(path, None)
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [content_hash.INDEX_NAME]


@pytest.mark.parametrize("weight", ["-1", "1e3", "nan", "half", "9" * 400])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, weight: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    (problem,) = source_problems("--data-path", [f"{path}:{weight}"])
    assert "expected a weight above 0" in problem
    assert source_problems("--data-path", [f"{path}:0.5"]) == []


def test_a_character_of_code_0_in_a_config_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig.from_mapping({"data_path": ["a\0b"], "chat_template": "c\0"})
    assert str(caught.value).count("without a character of code 0") == 2


@pytest.mark.parametrize("values", [{"data_cache_gib": 1e300}, {"micro_batch_size": 10**400}, {"lr": 10**400}])
def test_numbers_that_overflow_are_refused(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig.from_mapping({"load": "x", "save": "y", "mock_data": True, **values}).check()
    assert f"--{name.replace('_', '-')}: expected" in str(caught.value)


def test_examples_of_both_sets_are_reported() -> None:
    def opened(digests: list[int]) -> Any:
        return SimpleNamespace(
            where="--valid-data-path v",
            digests=np.asarray(digests, "u8"),
        )

    remark = _overlap({"data_path": opened([1, 2, 2**64 - 1]), "valid_data_path": opened([2, 2**64 - 1, 5, 2])})
    assert remark is not None and remark.startswith("--valid-data-path v: 3 of 4 examples are in the training data")
    assert _overlap({"data_path": opened([1]), "valid_data_path": opened([2])}) is None
    assert _overlap({"data_path": opened([1])}) is None


def test_changed_content_is_reported_with_other_changes() -> None:
    config = FinetuneConfig(load=Path("x"), save=Path("y"), data_path=("a",), seq_length=64)
    adapter: Any = SimpleNamespace(training={"data_path": ["a"], "seq_length": 32}, data_sha256="old")
    changed = changed_order(config, adapter, "new")
    assert changed == ["--seq-length 64 (was 32)", "--data-path a (its content has changed)"]
    assert changed_order(config, adapter, "old") == changed[:1]


def test_data_check_counts_what_the_template_refuses_as_not_usable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 3)

    def refuses(example: Example) -> Any:
        raise ExampleProblem("odd", example.place)

    result = check_data(CheckConfig(data_path=(str(path),)), CheckEncoding(refuses, lambda _: ""))
    assert (result.num_examples, result.num_bad) == (0, 3)


TURNS = (Message(USER, "Hello there"), Message(ASSISTANT, "Hi you"))


def test_generation_blocks_inside_of_others_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "nested.jinja"
    file.write_text(
        "{% generation %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
        "{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(ExampleProblem, match="inside of others"):
        open_chat_template(str(file), tiny_tokenizer).encode(Example("line 1", TURNS))


def test_a_token_of_two_blocks_counts_once(tiny_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "split.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}He{% endgeneration %}{% generation %}"
        "llo{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoded = open_chat_template(str(file), tiny_tokenizer).encode(Example("line 1", TURNS))
    learned = [number for begin, end in encoded.learned for number in range(begin, end)]
    assert len(learned) == len(set(learned))

"""Sources on the command line that cannot be used: one line for each, and a next step that helps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.data_sources import how_to_find, near_names
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.cache import cached_examples
from mixtral_run.train.data.cache.cached_examples import ExampleCaches
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.reading.preferences import convert_preference

LINE = '{"instruction": "a", "response": "b"}\n'


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("qa.jsonl", "other.csv"):
        Path(name).write_text(LINE)


def refused(*words: str) -> ConfigError:
    error = CliRunner().invoke(root, words).exception
    assert isinstance(error, ConfigError), error
    return error


@pytest.mark.parametrize("verb", [("data", "check"), ("finetune", "--load", "m", "--save", "s")])
def test_a_weight_for_some_sources_only_is_one_problem(verb: tuple[str, ...]) -> None:
    error = refused(*verb, "--data-path", "qa.jsonl:0.7", "--data-path", "other.csv")
    about_data = [each for each in error.problems if "--data-path" in each]
    assert about_data == [
        "--data-path: expected a weight for every source or for none; found none for other.csv: write "
        "other.csv:WEIGHT, or leave out :0.7"
    ]
    assert (error.next_command is None) is (verb[0] == "data"), "--help knows nothing about the content of data"


def test_a_weight_that_is_none_is_one_problem() -> None:
    (problem,) = refused("data", "check", "qa.jsonl:x").problems
    assert problem.endswith("expected a weight above 0, such as qa.jsonl:0.5; found 'x'")


def test_a_missing_source_with_a_weight_is_named_with_what_is_like_it() -> None:
    error = refused("data", "check", "qb.jsonl:0.7", "other.csv")
    assert "--data-path qb.jsonl:0.7: expected a file; found nothing of that name; like it: qa.jsonl" in error.problems


@pytest.mark.parametrize(
    ("name", "helps"),
    [
        ("qa.jsom", "the same command with qa.jsonl"),
        ("QA.JSONL", "the same command with qa.jsonl"),
        ("nothing.parquet", "ls ."),
        ("none/deeper/qa.jsonl", "ls ."),
    ],
)
def test_a_file_that_is_not_there(name: str, helps: str) -> None:
    assert how_to_find(Path(name)) == helps
    assert str(refused("data", "check", name).next_command).startswith(f"{helps}; a dataset on the hub is ")
    assert near_names(Path("none/x")) == []


def test_a_question_may_be_the_prompt_of_preferences() -> None:
    record = {"question": "a", "chosen": "b", "rejected": "c"}
    (problem,) = convert_preference(record, "pairs").problems
    assert problem.endswith("; --field prompt=question would take 'question'")
    assert not convert_preference(record, "pairs", fields={"prompt": "question"}).problems


def test_the_token_cache_is_named_without_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_examples, "Encoding", lambda *_: None)
    monkeypatch.setattr(cached_examples.ReadOptions, "of", lambda _: None)
    config: Any = SimpleNamespace(
        data_cache=Path("a/../cache"), data_cache_gib=1, distributed_timeout_minutes=1, chat_template="auto"
    )
    (tmp_path / "a").mkdir()
    base: Any = SimpleNamespace(tokenizer=tmp_path)
    caches = ExampleCaches(config, base, report=None, verify=False)  # type: ignore[arg-type]
    assert caches._folder.path == tmp_path / "cache"


def test_names_of_files_in_a_folder_cannot_change_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, text in (("a\x1b[2J\udcff.jsonl", "{}\n"), ("b\x1b[2J.jsonl", ""), ("c.jsonl", '{"text": "x"}\n')):
        (folder / name).write_text(text)
    (folder / "d\x1b[2J.bin").touch()
    stream = read_examples([str(folder)], ReadOptions(skip_bad_examples=True))
    assert [example.text for example in stream] == ["x"]
    said = "\n".join(stream.remarks())
    assert "\x1b" not in said and "\udcff" not in said
    for name in ("a\\x1b[2J\\udcff.jsonl", "b\\x1b[2J.jsonl", "d\\x1b[2J.bin"):
        assert name in said

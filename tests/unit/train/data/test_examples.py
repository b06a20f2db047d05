"""The check of a JSONL file: all problems at once, with their lines."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.examples import Example, read_example_file, read_examples
from tests.support.samples import samples_of

GOOD = '{"instruction": "a", "response": "b"}'


def refused(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_examples(path)
    assert str(path) in str(caught.value)
    return caught.value


def test_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_examples(tmp_path / "missing.jsonl", "valid_data_path")
    assert caught.value.what == "The validation data cannot be read."
    assert caught.value.where == f"--valid-data-path {tmp_path / 'missing.jsonl'}"


def test_examples_are_stripped_and_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": " Größe?\n", "response": "\t12 ", "source": "x"}, {"instruction": "b", "response": "c\nd"}]
    path.write_text("\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\r\n\n  \n" + json.dumps(rows[1]), "utf-8")
    assert read_examples(path) == [Example("Größe?", "12", 1), Example("b", "c\nd", 4)]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "a\u2028b\x85c", "response": "d"}\n', "utf-8")
    assert read_examples(path) == [Example("a\u2028b\x85c", "d", 1)]


IN_TURN = "'messages': expected the user and the assistant in turn, the assistant last; found "


def conversation(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": f" {role} {at} "} for at, role in enumerate(roles)]})


def test_a_conversation_is_its_turns(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    roles = ("user", "assistant", "user", "assistant")
    both = GOOD[:-1] + ", " + conversation("user", "assistant")[1:]
    path.write_text("\n".join([conversation(*roles), GOOD, conversation("system", *roles[:2]), both]), "utf-8")
    assert read_examples(path) == [
        Example("user 2", "assistant 3", 1, (("user 0", "assistant 1"),)),
        Example("a", "b", 2),
        Example("system 0\n\nuser 1", "assistant 2", 3),
        Example("a", "b", 4),
    ]


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ('{"messages": 3}', ["'messages': expected a list; found a number"]),
        ('{"messages": []}', [IN_TURN + "none"]),
        ('{"messages": ["a"]}', ["message 1: expected a JSON object; found text"]),
        (conversation("user"), [IN_TURN + "user"]),
        (conversation("assistant", "user"), [IN_TURN + "assistant, user"]),
        (conversation("user", "user", "assistant", "assistant"), [IN_TURN]),
        (conversation("user", "system", "assistant"), [IN_TURN]),
        (conversation("system"), [IN_TURN]),
        (conversation("user", "tool"), ["message 2: 'role': expected system, user, assistant; found \"tool\""]),
        ('{"messages": [{"role": "user", "content": ""}, {"content": 3}]}', [
            "message 1: 'content' is empty",
            "message 2: 'role': expected system, user, assistant; found null",
            "message 2: 'content': expected text; found a number",
        ]),
        ('{"instruction": "a", ' + conversation("user", "assistant")[1:], ["'response' is missing; the keys are"]),
    ],
)  # fmt: skip
def test_a_faulty_conversation_is_named(tmp_path: Path, line: str, problems: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", "utf-8")
    found = refused(path).problems
    assert len(found) == len(problems)
    assert all(mine.startswith(f"line 2: {problem}") for mine, problem in zip(found, problems, strict=True)), found


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"instruction": "a", "response": "b"', "broken JSON: Expecting ',' delimiter at column"),
        ('["a", "b"]', "expected a JSON object; found a list"),
        ("null", "expected a JSON object; found null"),
        ('{"response": "b"}', "'instruction' is missing; the keys are 'response'"),
        ('{"instruction": "a", "output": "b"}', "'response' is missing; the keys are 'instruction', 'output'"),
        ('{"instruction": "a", "response": 3}', "'response': expected text; found a number"),
        ('{"instruction": ["a"], "response": "b"}', "'instruction': expected text; found a list"),
        ('{"instruction": "a", "response": true}', "'response': expected text; found true or false"),
        ('{"instruction": "a", "response": " \\n"}', "'response' is empty"),
        ('{"instruction": "", "response": "b"}', "'instruction' is empty"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", "utf-8")
    problems = refused(path).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"line 3: {problem}")


def test_both_problems_of_a_line_are_told(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": 1, "response": ""}', "utf-8")
    assert refused(path).problems == (
        "line 1: 'instruction': expected text; found a number",
        "line 1: 'response' is empty",
    )


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" * 10, "utf-8")
    assert len(refused(path).problems) == 10
    path.write_text("{\n" * 1500, "utf-8")
    problems = refused(path).problems
    assert [problem.split(":")[0] for problem in problems[:10]] == [f"line {number}" for number in range(1, 11)]
    assert problems[10:] == ("and 1,490 more",)


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert "hold no example" in str(refused(path))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + '{"instruction": "Größe", "response": "b"}'.encode("latin1"))
    assert "line 2: byte 0xf6" in str(refused(path))


def test_deep_nesting_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("[" * 200_000, "utf-8")
    assert refused(path).problems[0].startswith("line 1: broken JSON")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in str(refused(tmp_path / "none.jsonl"))
    assert "directory" in str(refused(tmp_path))


def test_the_weight_of_an_answer_decides_whether_it_is_learned(tmp_path: Path, tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5", "weight": 0},
        {"role": "user", "content": "No. Again."}, {"role": "assistant", "content": "4", "weight": 1},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.", "train": False},
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": messages}), "utf-8")
    (example,) = read_examples(path)
    assert example.learned == (False, True, False)
    row = samples_of([example], tiny_tokenizer, 96).row(0)
    learned = [int(label) for label, counts in zip(row.labels, row.loss_mask, strict=True) if counts]
    assert tiny_tokenizer.decode(learned, skip_special_tokens=True).strip() == "4"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            {"weight": 0},
            "'messages': expected an answer that is learned; found 'weight' 0 or 'train' false on every one",
        ),
        ({"weight": 0.5}, "message 2: 'weight': expected 0 or 1; found 0.5"),
        ({"weight": "0"}, "message 2: 'weight': expected 0 or 1; found \"0\""),
        ({"train": 0}, "message 2: 'train': expected true or false; found 0"),
    ],
)
def test_a_weight_that_means_nothing_is_refused(tmp_path: Path, more: dict[str, object], problem: str) -> None:
    path = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]
    path.write_text(json.dumps({"messages": messages}), "utf-8")
    assert refused(path).problems[0] == f"line 1: {problem}"


@pytest.mark.parametrize("content", ["", " \n", None])
def test_an_empty_system_message_counts_as_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "data.jsonl"
    system = {"role": "system", "content": content}
    messages = [system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": messages}), "utf-8")
    assert read_examples(path) == [Example("a", "b", 1)]


def test_keys_that_are_not_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    chat = {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}], "id": 1}
    lines = [{"instruction": "a", "response": "b", "context": "c"}] * 2 + [chat]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    file = read_example_file(path)
    assert dict(file.unused_keys) == {"context": 2, "id": 1, "messages: name": 1}
    assert "'context' (2), " in str(file.describe_unused())
    path.write_text(GOOD, "utf-8")
    assert read_example_file(path).describe_unused() is None


def test_half_of_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + '\n{"instruction":"cut \\ud83d here","response":"fine \\ud83d\\ude00"}\n', "utf-8")
    expected = "line 2: 'instruction': half of a surrogate pair, \\ud83d, at character 5"
    assert refused(path).problems == (expected,)


@pytest.mark.parametrize(
    ("content", "name", "command"),
    [
        (gzip.compress(GOOD.encode()), "compressed with gzip", "gzip -dk"),
        (b"\x28\xb5\x2f\xfd....", "compressed with Zstandard", "zstd -dk"),
        (b"PAR1....PAR1", "a Parquet file", "read_parquet"),
        (b"ARROW1....", "an Arrow file", "read_feather"),
        (GOOD.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
        (f"[\n {GOOD},\n {GOOD}\n]\n".encode(), "one JSON list of 2 objects", "jq -c '.[]'"),
    ],
)
def test_other_formats_are_named_with_the_command_that_helps(
    tmp_path: Path, content: bytes, name: str, command: str
) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    text = str(refused(path))
    assert f"The data are {name}" in text and command in text and "latin1" not in text

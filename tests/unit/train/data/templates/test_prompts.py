"""Prompts in the shapes of training examples."""

import json
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.prompts import read_prompts

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("record", "roles", "last"),
    [
        ({"instruction": "Add."}, ["user"], "Add."),
        ({"instruction": "Add.", "input": "1 and 2"}, ["user"], "Add.\n\n1 and 2"),
        ({"instruction": "Add.", "response": "3"}, ["user"], "Add."),
        ({"instruction": "Add.", "output": "3", "input": ""}, ["user"], "Add."),
        ({"instruction": "Add.", "context": "1 2"}, ["user"], "Add.\n\n1 2"),
        ({"question": "Why?"}, ["user"], "Why?"),
        ({"question": "Why?", "answer": "So.", "system": "Be short."}, ["system", "user"], "Why?"),
        ({"prompt": "Once"}, ["user"], "Once"),
        ({"prompt": [USER]}, ["user"], "Hi"),
        ({"messages": [USER]}, ["user"], "Hi"),
        ({"messages": [USER, BOT]}, ["user"], "Hi"),
        ({"messages": [{"role": "system", "content": "S"}, USER, BOT, {"role": "user", "content": "And?"}]},
         ["system", "user", "assistant", "user"], "And?"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ["user"], "Hi"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, ["user"], "Hi"),
    ],
)  # fmt: skip
def test_shapes(record: dict[str, object], roles: list[str], last: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (prompt,) = read_prompts(file).prompts
    assert [message.role for message in prompt.messages] == roles
    assert prompt.shown == prompt.messages[-1].content == last
    assert prompt.text is None


def test_a_text_is_continued_and_unused_keys_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "Once upon"}\n\n{"instruction": "Add.", "difficulty": 3}\n')
    found = read_prompts(file)
    assert [prompt.text for prompt in found.prompts] == ["Once upon", None]
    assert found.prompts[1].place == "line 3"
    assert any("'difficulty'" in remark for remark in found.remarks)


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        '{"instruction": ""}',
        "{broken",
        '{"foo": 1}',
        '"text"',
        '{"messages": []}',
        '{"messages": [{"role": "x"}]}',
    ]
    file.write_text("\n".join([*lines, '{"instruction": "Good."}']))
    with pytest.raises(ConfigError) as caught:
        read_prompts(file)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"line {number}" for number in range(1, 7)]
    assert "…" not in "".join(caught.value.problems), "the stand-in for an answer is never shown"


@pytest.mark.parametrize("kind", ["missing", "folder", "empty"])
def test_files_without_prompts(kind: str, tmp_path: Path) -> None:
    file = {"missing": tmp_path / "none.jsonl", "folder": tmp_path, "empty": tmp_path / "empty.jsonl"}[kind]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError):
        read_prompts(file)

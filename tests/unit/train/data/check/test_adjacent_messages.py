"""Adjacent messages of one role: joined in Mixtral's form, left as they are in Jinja templates, and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.data import CheckConfig
from mixtral_run.train.data.check.check import CheckResult, check_data
from mixtral_run.train.data.check.check_encoding import load_encoding
from mixtral_run.train.data.check.check_screen import check_lines

U, A = "user", "assistant"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALTERNATE = "{% if messages[1].role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML


def check(tmp_path: Path, folder: Path, template: str, *rows: Any, **more: Any) -> CheckResult:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if template != "mixtral":
        (tmp_path / "t.jinja").write_text(template)
        template = str(tmp_path / "t.jinja")
    return check_data(CheckConfig(data_path=(str(file),), **more), load_encoding(folder, template))


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


TWICE = chat((U, "Hello."), (U, "Say 1."), (A, "1"), (A, "And 2"))


def test_mixtral_joins_them_and_the_conversations_are_named(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    joined = chat((U, "Hello.\n\nSay 1."), (A, "1\n\nAnd 2"))
    result = check(tmp_path, tiny_tokenizer_folder, "mixtral", TWICE, joined)
    assert result.num_bad == 0 and result.rendered[0].ids == result.rendered[1].ids
    assert result.rendered[0].mask == result.rendered[1].mask
    assert (
        "  ! 1 conversation has adjacent messages of one role (line 1): Mixtral-Instruct's form joins them with an "
        "empty line, a Jinja template gets them as they are."
    ) in check_lines(result, color=False)


def test_a_jinja_template_decides(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    result = check(tmp_path, tiny_tokenizer_folder, CHATML, TWICE)
    text = "".join(part.text for part in result.rendered[0].parts).replace(" ", "")
    assert text == "<|user|>Hello.</s><|user|>Say1.</s><|assistant|>1</s><|assistant|>And2</s>"
    refused = check(tmp_path, tiny_tokenizer_folder, ALTERNATE, TWICE)
    assert refused.num_bad == 1 and "roles must alternate" in refused.problems[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": U, "content": "a"}, {"role": A, "content": "b"}], "chosen": "c", "rejected": "d"},
        {
            "chosen": chat((U, "a"), (A, "b"), (A, "c"))["messages"],
            "rejected": chat((U, "a"), (A, "b"), (A, "d"))["messages"],
        },
    ],
)
def test_an_answer_behind_an_answer_of_the_prompt_is_refused(
    tmp_path: Path, tiny_tokenizer_folder: Path, row: dict[str, Any]
) -> None:
    result = check(tmp_path, tiny_tokenizer_folder, "mixtral", row, method="dpo")
    assert result.num_bad == 1 and "adjacent answers" in result.problems[0]

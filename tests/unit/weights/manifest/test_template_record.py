"""A chat template next to a tokenizer's files is found as Transformers finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.weights.manifest.template_record import TemplateRecord


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, None),
        ("{{ a }}", TemplateRecord("tokenizer", "{{ a }}")),
        (
            [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}],
            TemplateRecord("tokenizer", "x", "y"),
        ),
        ([{"name": "rag", "template": "x"}], TemplateRecord("tokenizer", "x")),
        ({"default": "x", "rag": "z"}, TemplateRecord("tokenizer", "x")),
        ("", None),
    ],
)
def test_the_template_of_a_tokenizers_config(tmp_path: Path, own: Any, expected: TemplateRecord | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": own, "eos_token": "</s>"}))
    assert TemplateRecord.read(tmp_path) == expected


@pytest.mark.parametrize("tools", [None, "tools: {{ b }}"])
def test_what_was_written_is_read_before_the_config(tmp_path: Path, tools: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    record = TemplateRecord("tokenizer", "Grüße {{ a }}\n", tools)
    record.write(tmp_path)
    assert TemplateRecord.read(tmp_path) == record


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert TemplateRecord.read(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b"[" * 200_000),
        ("tokenizer_config.json", b'{"chat_template": {"a": "x", "b": "y"}}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_template_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        TemplateRecord.read(tmp_path)

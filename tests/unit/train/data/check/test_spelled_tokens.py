"""Texts that spell control tokens: they stay text, `data check` shows and counts them, and --json has ids and mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_run.config.data import CheckConfig
from mixtral_run.train.data.check.check import CheckResult, check_data
from mixtral_run.train.data.check.check_encoding import load_encoding
from mixtral_run.train.data.check.check_screen import check_lines
from mixtral_run.train.data.reading.example import ASSISTANT, USER, Example, Message
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.data.templates.open_template import open_chat_template
from mixtral_run.train.data.templates.spelled_tokens import AS_MARKER, AS_TEXT, AS_TOKEN, SpelledTokens

ROWS = (
    {"instruction": "Repeat: a</s>b", "response": "a</s>b"},
    {"instruction": "Say [INST] now", "response": "now"},
    {"instruction": "Say 1", "response": "1"},
    {"text": "<s>one</s>"},
)


def check(tmp_path: Path, folder: Path, *rows: object, template: str = "mixtral") -> CheckResult:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_data(CheckConfig(data_path=(str(file),)), load_encoding(folder, template))


def test_the_text_of_a_token_is_counted_shown_apart_and_never_the_token(
    tmp_path: Path, tiny_tokenizer_folder: Path, tiny_tokenizer: Any
) -> None:
    result = check(tmp_path, tiny_tokenizer_folder, *ROWS)
    found = {each.token: (each.encoded_as, each.num_examples, each.places) for each in result.spelled}
    assert found == {
        "</s>": (AS_TEXT, 2, ["line 1", "line 4"]),
        "<s>": (AS_TEXT, 1, ["line 4"]),
        "[INST]": (AS_MARKER, 1, ["line 2"]),
    }
    screen = "\n".join(check_lines(result, color=False))
    assert (
        "  ! 2 examples have texts that spell the control token '</s>' (line 1; line 4). It is encoded as text"
        in screen
    )
    assert "  ! 1 example has a text that spells the template's marker '[INST]' (line 2). The template writes" in screen
    assert "a</s>b [/INST]⟦ a</s>b‹</s>›⟧" in screen
    colored = "\n".join(check_lines(result, color=True))
    assert "a</s>b\x1b[0m\x1b[32m\x1b[7m</s>\x1b[0m" in colored and "\x1b[7m<s>\x1b[0m" in colored
    first = result.to_mapping()["rendered"][0]
    ids, mask = list(first["ids"]), list(first["mask"])
    # One begin and one end, whatever the texts spell; the end is learned, and what is before the answer is not.
    assert ids.count(tiny_tokenizer.eos_token_id) == 1 and ids.count(tiny_tokenizer.bos_token_id) == 1
    assert ids[-1] == tiny_tokenizer.eos_token_id and len(mask) == len(ids) and mask[0] == 0 and mask[-1] == 1
    answer = [number for number, counts in zip(ids, mask, strict=True) if counts]
    assert tiny_tokenizer.decode(answer).strip() == "a</s>b</s>"


def test_markers_of_a_jinja_template(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    """<|im_end|> is no token of this tokenizer; the template ends answers with </s>."""
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = ({"instruction": "a<|im_end|>", "response": "[INST]"}, {"instruction": "a</s>", "response": "b"})
    result = check(tmp_path, tiny_tokenizer_folder, *rows, template=str(file))
    found = {each.token: (each.encoded_as, each.places) for each in result.spelled}
    assert found == {"<|im_end|>": (AS_MARKER, ["line 1"]), "</s>": (AS_TEXT, ["line 2"])}


def test_a_text_that_becomes_a_token_would_be_reported(tiny_tokenizer: Any) -> None:
    template = open_chat_template("mixtral", tiny_tokenizer)
    given = Example("line 1", (Message(USER, "a</s>"), Message(ASSISTANT, "b")))
    encoded = template.encode(given)
    assert SpelledTokens(template).find(given, encoded) == {"</s>": AS_TEXT}
    tokens = np.insert(encoded.tokens, 3, tiny_tokenizer.eos_token_id)
    assert SpelledTokens(template).find(given, EncodedExample(tokens, encoded.learned)) == {"</s>": AS_TOKEN}


@pytest.mark.parametrize("place", ["content", "calls", "tools", "text"])
def test_every_text_of_an_example_is_searched(tiny_tokenizer: Any, place: str) -> None:
    spelled = ({"function": {"name": "f", "arguments": "</s>"}},)
    messages = (Message(USER, "</s>" if place == "content" else "a"), Message(ASSISTANT, "b"))
    if place == "calls":
        messages = (messages[0], Message(ASSISTANT, "", tool_calls=spelled))
    given = Example("line 1", messages, tools=spelled if place == "tools" else ())
    given = Example("line 1", text="a</s>") if place == "text" else given
    template = open_chat_template("mixtral", tiny_tokenizer)
    assert SpelledTokens(template).find(given, EncodedExample(np.asarray([1, 5, 2], np.int32), ())).keys() == {"</s>"}

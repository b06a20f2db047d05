"""Mixtral-Instruct's form: equal to mistral-common on random conversations, ids and learned positions."""

import json
import random
from typing import Any

import pytest

from mixtral_run.train.data.example import Example, Message
from mixtral_run.train.data.open_template import open_chat_template
from tests.support.mistral_tokenizers import MistralCommon, hf_tokenizer

NUM_CONVERSATIONS = 3_000
WORDS = (
    *("the", "model", "answers", "7 times 8", "is", "56", "def f(x):", "return x_1", "Grüße", "Łódź", "東京", "です。"),
    *(
        "привет",
        "мир",
        "שלום",
        "مرحبا",
        "👩\u200d👩\u200d👧",
        "🙂",
        "e\u0301",
        "ﬁ",
        "½",
        "</s>",
        "<s>",
        "<unk>",
        "[INST]",
        "[/INST]",
    ),
    *("[TOOL_CALLS]", "<|im_end|>", "▁", "]]", "[", "{}", "\\", '"', "'", "—", "…"),
    *("\u00a0", "\u3000", "zero\u200bwidth", "\x07"),
)
BLANKS = (" ", " ", " ", "  ", "\n", "\n\n", "\t", "    ", "\r\n")
AROUND = ("", "", "", " ", "   ", "\n", "\n    ", "\t")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"tool_{number}",
            "description": "Wetter — 東京" if number else "",
            "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
        },
    }
    for number in range(3)
]


def text(rng: random.Random) -> str:
    words = "".join(rng.choice(WORDS) + rng.choice(BLANKS) for _ in range(rng.randint(0, 12)))
    return rng.choice(AROUND) + words + rng.choice(WORDS[:-4]) + rng.choice(AROUND)


def tool_call(rng: random.Random) -> dict[str, Any]:
    arguments = rng.choice((json.dumps({"where": text(rng)}), "", "no JSON"))
    number = "".join(rng.choices("abcXYZ0189", k=9))
    return {"id": number, "type": "function", "function": {"name": "tool_1", "arguments": arguments}}


def conversation(rng: random.Random, *, with_tools: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        messages.append({"role": "system", "content": rng.choice(("", text(rng), text(rng)))})
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.choice((1, 1, 1, 2))):
            messages.append({"role": "user", "content": text(rng)})
        if with_tools and rng.random() < 0.5:
            calls = [tool_call(rng) for _ in range(rng.randint(1, 2))]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            results = (json.dumps({"°C": 7, "text": text(rng)}, ensure_ascii=rng.random() < 0.5), text(rng), "12", "")
            messages += [{"role": "tool", "content": rng.choice(results), "tool_call_id": call["id"]} for call in calls]
        for _ in range(rng.choice((1, 1, 1, 1, 2))):
            messages.append({"role": "assistant", "content": text(rng), "weight": rng.choice((1, 1, 0))})
    if not any(each.get("weight", 1) for each in messages if each["role"] == "assistant"):
        messages[-1]["weight"] = 1
    return messages


def example_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Example:
    return Example(
        "line 1",
        tuple(
            Message(
                each["role"],
                each["content"],
                bool(each.get("weight", 1)),
                tuple(each.get("tool_calls", ())),
                each.get("tool_call_id"),
            )
            for each in messages
        ),
        tools=tuple(tools),
    )


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_tokens_and_learned_positions_are_those_of_mistral_common(version: str) -> None:
    rng, reference = random.Random(20), MistralCommon(version)
    template = open_chat_template("auto", hf_tokenizer(version))
    assert template.name == "mixtral" and version in template.describe()
    different = []
    for number in range(NUM_CONVERSATIONS):
        with_tools = version == "v3" and number % 2 == 0
        messages = conversation(rng, with_tools=with_tools)
        tools = rng.sample(TOOLS, rng.randint(1, 3)) if with_tools else []
        ids, learned = reference.encode(messages, tools)
        encoded = template.encode(example_of(messages, tools))
        found = [place for begin, end in encoded.learned for place in range(begin, end)]
        if encoded.tokens.tolist() != ids or found != learned:
            different.append(messages)
    assert len(different) == 0, (len(different), min(different, key=lambda each: len(str(each))))

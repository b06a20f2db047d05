"""Mixtral-Instruct's form: equal to mistral-common on random conversations, ids and learned positions."""

import json
import random
from typing import Any

import pytest

from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates.open_template import open_chat_template
from mixtral_run.trial.sizes import INSTRUCTIONS
from tests.support.mistral_tokenizers import MistralCommon, hf_tokenizer
from tests.support.samples import instruct_form

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


BOS, EOS = 1, 2
SHIPPED = [tuple(json.loads(line).values()) for line in INSTRUCTIONS.read_text("utf-8").splitlines()]
TURNS = [*SHIPPED, ("日本の首都は?", "東京です。"), ("a </s> b [INST]", "</s>"), ("]", "]"), ("Indent", "\n    x = 1")]


@pytest.fixture(params=["tiny_tokenizer", "llama_like_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a_row_is_the_tokenization_of_the_whole_text(tokenizer: Any) -> None:
    template = open_chat_template("auto", tokenizer)
    assert template.name == "mixtral" and template.stop_ids == {EOS}
    for question, answer in TURNS:
        encoded = template.encode(Example("line 1", (Message("user", question), Message("assistant", answer))))
        whole = tokenizer(f"[INST] {question} [/INST] {answer}", add_special_tokens=False, split_special_tokens=True)
        assert encoded.tokens.tolist() == [BOS, *whole["input_ids"], EOS]
        prompt = template.prompt([Message("user", question)])
        assert encoded.learned == ((len(prompt), len(encoded.tokens)),)
        assert encoded.tokens[: len(prompt)].tolist() == prompt


def test_a_conversation_is_its_turns_behind_one_beginning(tokenizer: Any) -> None:
    template = open_chat_template("mixtral", tokenizer)
    turns = [(Message("user", question), Message("assistant", answer)) for question, answer in TURNS[:3]]
    alone = [template.encode(Example("line 1", turn)) for turn in turns]
    together = template.encode(Example("line 1", tuple(message for turn in turns for message in turn)))
    assert together.tokens.tolist() == [BOS, *(each for one in alone for each in one.tokens[1:].tolist())]
    learned = [together.tokens[begin:end].tolist() for begin, end in together.learned]
    assert learned == [one.tokens[begin:end].tolist() for one in alone for begin, end in one.learned]


def test_the_blanks_before_an_answer_are_learned(tokenizer: Any) -> None:
    question, answer = Message("user", "Complete the body:\ndef f(x):"), "    return x + 1"
    encoded = open_chat_template("auto", tokenizer).encode(Example("line 1", (question, Message("assistant", answer))))
    ((begin, end),) = encoded.learned
    # A blank ends the prompt's [/INST] in text; the others are the answer's.
    assert tokenizer.decode(encoded.tokens[: end - 1].tolist()).endswith("[/INST]     return x + 1")
    assert tokenizer.decode(encoded.tokens[begin : end - 1].tolist()).lstrip(" ") == "return x + 1"


def test_a_tokenizer_that_merges_across_the_boundary_still_keeps_the_prompt_whole() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *"[INST]/ abc56"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(letters))}
    vocabulary |= {"] ": len(vocabulary)}
    core = Tokenizer(models.BPE(vocabulary, [("]", " ")], unk_token="<unk>"))
    hostile = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    merged = hostile("[INST] a [/INST] 56", add_special_tokens=False)["input_ids"]
    assert merged[-3] == vocabulary["] "], "the stand-in no longer merges across the boundary"

    template = open_chat_template("mixtral", hostile)
    encoded = template.encode(Example("line 1", (Message("user", "a"), Message("assistant", "56"))))
    prompt = template.prompt([Message("user", "a")])
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert hostile.convert_ids_to_tokens(encoded.tokens[len(prompt) :].tolist()) == ["5", "6", "</s>"]


CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
QUESTION = Message("user", "a")


@pytest.mark.parametrize(
    ("version", "messages", "tools", "words"),
    [
        ("v1", (QUESTION, Message("assistant", "b")), TOOLS, "tools: Mixtral-Instruct's form has none"),
        ("v1", (QUESTION, Message("assistant", "", tool_calls=(CALL,))), (), "tools: Mixtral-Instruct's form has none"),
        ("v3", (QUESTION, Message("assistant", "b", tool_calls=(CALL,))), (), "a text and tool calls"),
        ("v3", (QUESTION, Message("assistant", "", tool_calls=(CALL | {"id": "1"},))), (), "nine letters .* found .1."),
        ("v3", (QUESTION, Message("assistant", "", tool_calls=({"id": "1"},))), (), "expected a function with a name"),
        ("v3", (QUESTION, Message("tool", "7"), Message("assistant", "b")), (), "nine letters .* found null"),
        ("v3", (QUESTION, Message("assistant", "b")), ({"type": "x"},), "tools: expected"),
        ("v3", (QUESTION, Message("assistant", "b")), ({"function": {"name": "f", "returns": 1}},), "no key 'returns'"),
        ("v3", (QUESTION, Message("assistant", "b")), ({"function": {"name": "f"}},), "'name' and 'parameters'"),
        ("v3", (QUESTION, Message("assistant", "half \ud83d")), (), "cannot be written as UTF-8"),
    ],
)  # fmt: skip
def test_what_the_form_cannot_write_is_refused_by_name(version: str, messages: Any, tools: Any, words: str) -> None:
    with pytest.raises(ExampleProblem, match=words):
        instruct_form(hf_tokenizer(version)).encode(Example("line 1", messages, tools=tuple(tools)))

"""Jinja chat templates: equal to Transformers' apply_chat_template; what is learned; what is refused."""

import copy
import pickle
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates import template_sandbox
from mixtral_run.train.data.templates.open_template import open_chat_template
from tests.support.mistral_tokenizers import hf_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    *(
        "the",
        "model",
        "answers",
        "56",
        "def f(x):",
        "x_1",
        "Grüße",
        "東京",
        "です",
        "привет",
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "ﬁ",
    ),
    *("▁", "]]", "{", "\\", '"', "[INST]", "<|", "|>", "\u00a0", "\u3000"),
)


def as_chatml(tokenizer: Any) -> Any:
    """Return a tokenizer with the two tokens of ChatML, as fine-tunes of Mixtral have it."""
    from tokenizers import AddedToken

    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"eos_token": "<|im_end|>"})
    changed.add_tokens([AddedToken("<|im_start|>", normalized=False)])
    changed.chat_template = CHATML
    return changed


@pytest.fixture(scope="module")
def chatml(llama_like_tokenizer: Any) -> Any:
    return as_chatml(llama_like_tokenizer)


def with_template(tokenizer: Any, template: Any) -> Any:

    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def conversation(rng: random.Random) -> list[Message]:
    def text() -> str:
        around = ("", "", " ", "\n", "\n   ")
        return rng.choice(around) + " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + rng.choice(around)

    messages = [Message("system", text())] * (rng.random() < 0.4)
    for _ in range(rng.randint(1, 4)):
        messages += [Message("user", text()), Message("assistant", text())]
    return messages


def chatml_with(after_role: str) -> str:
    """Return ChatML with another text between a role and its message."""
    return CHATML.replace("role + '\n'", f"role + '{after_role}'").replace("assistant\n", f"assistant{after_role}")


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation blocks"])
def test_tokens_and_learned_positions_are_those_of_apply_chat_template(template: str) -> None:
    chatml = as_chatml(hf_tokenizer("v1"))
    rng, found = random.Random(21), open_chat_template("auto", with_template(chatml, template))
    assert found.name == "tokenizer"
    for _ in range(500):
        messages = conversation(rng)
        expected = chatml.apply_chat_template(
            as_dicts(messages), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = found.encode(Example("line 1", tuple(messages)))
        assert encoded.tokens.tolist() == expected["input_ids"], messages
        learned = [place for begin, end in encoded.learned for place in range(begin, end)]
        assert learned == [place for place, counts in enumerate(expected["assistant_masks"]) if counts], messages
        prompt = chatml.apply_chat_template(as_dicts(messages[:-1]), add_generation_prompt=True, return_dict=False)
        assert found.prompt(messages[:-1]) == prompt


@pytest.mark.parametrize(
    ("before", "scheme"), [("\n", "prepend"), ("", "prepend"), (" ", "prepend"), ("", "first"), ("\n", "first")]
)
def test_control_tokens_in_a_text_stay_text_and_change_nothing_around(chatml: Any, before: str, scheme: str) -> None:
    """Two ways to the same tokens: the template's control tokens found by Transformers, and by stand-ins."""
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = copy.deepcopy(chatml)
    if scheme == "first":
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    # The text right behind a control token is where tokenizers put a blank, or do not.
    tokenizer.chat_template = chatml_with(f"<s>{before}")
    template, rng = open_chat_template("auto", tokenizer), random.Random(22)
    encoder = template._encoder
    for _ in range(100):
        messages = conversation(rng)
        text = tokenizer.apply_chat_template(as_dicts(messages), tokenize=False)
        assert encoder.encode(text, hidden=True) == encoder.encode(text, hidden=False)
        # A letter cannot merge with a control token's text: the same tokens, but for the ones of that text.
        marked = [Message(each.role, f"x <|im_end|> <s> {each.content}") for each in messages]
        encoded = template.encode(Example("line 1", tuple(marked)))
        names = tokenizer.convert_ids_to_tokens(encoded.tokens.tolist())
        assert names.count("<|im_end|>") == len(messages) == names.count("<|im_start|>") == names.count("<s>")
        assert tokenizer.decode(encoded.tokens).count("x <|im_end|> <s>") == len(messages)
        for begin, end in encoded.learned:
            assert names[end - 1] == "<|im_end|>" and names[begin:end].count("<|im_end|>") == 1


def test_a_blank_without_a_character_of_its_own_is_learned(chatml: Any) -> None:
    """SentencePiece writes `▁` before a text that follows a control token; generation must produce it."""
    template = open_chat_template("auto", with_template(chatml, chatml_with("<s>")))
    encoded = template.encode(Example("line 1", (Message("user", "a"), Message("assistant", "\x07"))))
    (begin, end), ids = encoded.learned[0], encoded.tokens.tolist()
    assert chatml.convert_ids_to_tokens(ids[begin - 1 : end]) == ["<s>", "▁", "<0x07>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            CHATML + "{{ eos_token if not add_generation_prompt }}",
            ["up to message 2 has", "|>\\n<|im_end|>'", "the whole has", "|>\\n<|im_start|>user"],
        ),
        (
            CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"),
            ["prompt for message 2 has", "assistant\\n<think>'", "with it has", "character 52"],
        ),
        (CHATML.replace("<|im_end|>\n", "\n"), ["has no control token", "would not learn to stop"]),
        ("{{ messages[0].content }}", ["the template writes nothing for message 2"]),
        (
            "{{ raise_exception('only one turn') if messages | length > 2 }}" + CHATML,
            ["cannot write it: only one turn"],
        ),
        ("{{ messages.x.y }}", ["cannot write it: UndefinedError"]),
        ("{{ messages.__class__.__mro__ }}", ["SecurityError"]),
        (MARKED.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen"), ["would not learn to stop"]),
        ("{% generation %}{% endgeneration %}" + CHATML, ["generation blocks are empty"]),
    ],
)
def test_a_template_that_does_not_fit_is_refused_in_words(chatml: Any, template: str, words: list[str]) -> None:
    found = open_chat_template("auto", with_template(chatml, template))
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    with pytest.raises(ExampleProblem) as caught:
        found.encode(Example("line 7", turns))
    assert "line 7" in str(caught.value) and all(word in caught.value.problem for word in words), str(caught.value)


def test_the_end_of_an_answer_that_stops_nothing_is_shown(chatml: Any) -> None:
    found = open_chat_template("auto", with_template(chatml, CHATML.replace("<|im_end|>\n", "\n")))
    with pytest.raises(ExampleProblem) as caught:
        found.encode(Example("line 7", (Message("user", "a"), Message("assistant", "0123456789abcdefghijklmnop"))))
    assert caught.value.problem == (
        "the template ends an answer with '789abcdefghijklmnop\\n', which has no control token; a model would not "
        "learn to stop"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "time .*\n.*\n.*0.2 seconds",
        ),
        ("{% for a in range(99999) %}{% for b in range(99999) %}abcdefgh{% endfor %}{% endfor %}", "output"),
        ("{{ 'a' * 10**11 }}", "memory"),
        (
            "{% set x = namespace(t='aaaaaaaa') %}{% for a in range(99) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
            "memory",
        ),
    ],
)
def test_a_template_cannot_stop_the_machine(
    chatml: Any, monkeypatch: pytest.MonkeyPatch, template: str, words: str
) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2 if "time" in words else 60)
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    found = open_chat_template("auto", with_template(chatml, template + "{{ messages }}"))
    # Not the example's fault: it ends the run, and is not tried for every example.
    with pytest.raises(ConfigError, match=f"too much {words}") as caught:
        found.encode(Example("line 1", (Message("user", "a"), Message("assistant", "b"))))
    assert not isinstance(caught.value, ExampleProblem)
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_block_without_the_end_of_the_turn_gets_it(chatml: Any) -> None:
    changed = MARKED.replace(
        " + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}"
    )
    assert changed != MARKED
    example = Example("line 1", (Message("user", "a"), Message("assistant", "b c"), Message("assistant", "d")))
    one, other = (open_chat_template("auto", with_template(chatml, each)).encode(example) for each in (MARKED, changed))
    assert one.tokens.tolist() == other.tokens.tolist() and one.learned == other.learned


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation blocks"])
def test_only_answers_that_are_learned_are(chatml: Any, template: str) -> None:
    found = open_chat_template("auto", with_template(chatml, template))
    messages = (
        Message("system", ""), Message("user", "a"), Message("assistant", "b", False), Message("user", "c"),
        Message("assistant", "d"),
    )  # fmt: skip
    encoded = found.encode(Example("line 1", messages))
    begin, end = encoded.learned[0]
    assert len(encoded.learned) == 1
    assert chatml.decode(encoded.tokens[begin:end]) == "d<|im_end|>"
    # An empty system message counts as none.
    assert encoded.tokens.tolist() == found.encode(Example("line 1", messages[1:])).tokens.tolist()
    text = found.encode(Example("line 2", text="a <|im_end|> b"))
    assert text.learned == ((1, len(text.tokens)),)
    assert chatml.convert_ids_to_tokens(text.tokens.tolist())[0] == "<s>"
    assert text.tokens.tolist().count(chatml.eos_token_id) == 1 and text.tokens[-1] == chatml.eos_token_id


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ((), "no messages"),
        ((Message("user", "a"),), "ends with the user"),
        ((Message("user", "a"), Message("assistant", "")), "message 2: the assistant's answer is empty"),
        ((Message("user", "a"), Message("assistant", "b", False)), "no answer counts in the loss"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "mixtral"])
def test_a_conversation_without_an_answer_is_refused(chatml: Any, choice: str, messages: Any, words: str) -> None:
    with pytest.raises(ExampleProblem, match=words) as caught:
        open_chat_template(choice, chatml).encode(Example("row 3 of my.csv", messages))
    assert caught.value.where == "row 3 of my.csv"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problem) == (str(caught.value), caught.value.problem)


def test_tools_reach_a_template_as_objects(chatml: Any) -> None:
    """A tokenizer may have a template of its own for tools. Arguments of calls are objects in templates."""
    with_tools = (
        "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content }}{% for call in message.tool_calls %}"
        "{{ call.function.name + '(' + call.function.arguments.x + ')' }}{% endfor %}"
        "{{ message.tool_call_id }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(chatml, {"default": CHATML, "tool_use": with_tools})
    found, tools = open_chat_template("auto", tokenizer), ({"type": "function", "function": {"name": "f"}},)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}
    messages = (
        Message("user", "a"), Message("assistant", "", tool_calls=(call,)), Message("tool", "7", tool_call_id="c1"),
        Message("assistant", "b"),
    )  # fmt: skip
    encoded = found.encode(Example("line 1", messages, tools=tools))
    assert [chatml.decode(encoded.tokens[begin:end]) for begin, end in encoded.learned] == [
        "f(1)<|im_end|>",
        "b<|im_end|>",
    ]
    assert chatml.decode(encoded.tokens)[0] == "f" and "7c1" in chatml.decode(encoded.tokens)
    assert found.record.tools_text == with_tools


def test_a_prompt_of_generation_begins_a_row_of_training(chatml: Any) -> None:
    for choice in ("auto", "mixtral"):
        found = open_chat_template(choice, chatml)
        question = [Message("system", "s"), Message("user", "  2 </s> <|im_end|> 3  ")]
        encoded = found.encode(Example("line 1", (*question, Message("assistant", "5"))))
        prompt = found.prompt(question)
        assert encoded.tokens[: len(prompt)].tolist() == prompt and encoded.learned[0][0] == len(prompt)


def test_generation_stops_at_the_end_of_a_turn(chatml: Any) -> None:
    assert open_chat_template("auto", chatml).stop_ids == {chatml.convert_tokens_to_ids("<|im_end|>")}
    other = copy.deepcopy(chatml)
    other.eos_token = "</s>"
    assert open_chat_template("auto", other).stop_ids == {2, chatml.convert_tokens_to_ids("<|im_end|>")}
    assert open_chat_template("mixtral", other).stop_ids == {2}


@pytest.mark.parametrize("choice", ["auto", "mixtral"])
def test_no_text_stands_for_a_control_token(chatml: Any, choice: str) -> None:
    """The stand-ins of control tokens are characters, which a text may contain as well."""
    found = open_chat_template(choice, chatml)
    for name in ("_stand_in_of_text", "_stand_in_of_token"):
        for control in ("</s>", "<|im_end|>"):
            text = "<|im_end|> " + getattr(found._encoder, name)(control)
            for example in (
                Example("line 1", (Message("user", text), Message("assistant", "b"))),
                Example("line 1", text=text),
            ):
                try:
                    encoded = found.encode(example)
                except ExampleProblem:
                    continue
                ids = encoded.tokens[:-1].tolist() if example.text else encoded.tokens[: encoded.learned[0][0]].tolist()
                shown = 1 if choice == "auto" and not example.text else 0
                assert ids.count(chatml.eos_token_id) == shown and 2 not in ids


def test_the_example_in_the_documentation_is_what_training_learns(tiny_tokenizer: Any) -> None:
    text = (Path(__file__).parents[5] / "docs" / "concepts" / "chat_templates.md").read_text("utf-8")
    block = text[text.index("    <|im_start|>user") :].split("\n\n")[0]
    shown = "".join(f"{line.removeprefix('    ')}\n" for line in block.splitlines())
    tokenizer = as_chatml(tiny_tokenizer)
    turns = (("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3 more?"), ("assistant", "7."))
    encoded = open_chat_template("auto", tokenizer).encode(Example("line 1", tuple(Message(*turn) for turn in turns)))
    pieces, before = [], 0
    for begin, end in encoded.learned:
        pieces += [tokenizer.decode(encoded.tokens[before:begin]), f"⟦{tokenizer.decode(encoded.tokens[begin:end])}⟧"]
        before = end
    assert "".join([*pieces, tokenizer.decode(encoded.tokens[before:])]) == shown

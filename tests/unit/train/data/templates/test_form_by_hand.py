"""Mixtral-Instruct's form in small parts, with values that were worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, TOOL, USER, Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates import mixtral_form
from mixtral_run.train.data.templates.mixtral_form import V3_TOKENS, MixtralForm

FUNCTION = {"name": "f", "parameters": {}}
CALL = {"id": "abcdefgh1", "function": {"name": "f"}}
FIRST = 2_000_000
"""Id of the first control token, above those of all characters."""
QUESTION, ANSWER = Message(USER, "a"), Message(ASSISTANT, "b")


def same_text(text: str) -> str:
    """Return an equal text that is another object, as a file gives it."""
    return "".join(list(text))


def letters(special: dict[str, list[int]] | None = None, v3: bool = False) -> Any:
    """Return an encoder of one id a character, with other ids for some texts."""
    control = {name: FIRST + number for number, name in enumerate(V3_TOKENS)} if v3 else {}
    known = special or {}
    return SimpleNamespace(
        control=control, definition="d", text_ids=lambda text: known.get(text) or [ord(each) for each in text]
    )


def read(ids: list[int]) -> str:
    names = {1: "<s>", 2: "</s>"} | {FIRST + number: name for number, name in enumerate(V3_TOKENS)}
    return "".join(names.get(number) or chr(number) for number in ids)


@pytest.mark.parametrize("v3", [False, True])
def test_roles_are_compared_by_their_letters(v3: bool) -> None:
    """A conversation that begins with an answer, has several system messages, questions and answers in a row."""
    turns = (
        ("system", "S"), ("assistant", "A"), ("system", ""), ("user", "日本"), ("user", "é"), ("system", "T"),
        ("assistant", "B"), ("assistant", "C"), ("user", "D"), ("assistant", "E"),
    )  # fmt: skip
    form = MixtralForm(letters(v3=v3), 1, 2)
    learned = {"A": False, "E": False, "日本": False}
    messages = tuple(Message(same_text(role), text, learned.get(text, True)) for role, text in turns)
    ids, spans = form._encode_messages(Example("line 1", messages))
    if v3:
        expected = "<s>[INST][/INST]A</s>[INST]日本\n\né[/INST]B\n\nC</s>[INST]S\n\nT\n\nD[/INST]E</s>"
    else:
        expected = "<s>[INST] S\n\nT\n\n [/INST] A</s>[INST] 日本\n\né [/INST] B\n\nC</s>[INST] D [/INST] E</s>"
    assert read(ids) == expected
    assert [read(ids[begin:end]) for begin, end in spans] == ["B\n\nC</s>" if v3 else " B\n\nC</s>"]
    assert form.encode(Example("line 1", messages)).learned == tuple(spans)
    assert form.describe() == (
        f"Mixtral-Instruct's form, as tokenizer {'v3' if v3 else 'v1'} of mistral-common writes it"
    )
    assert form._details() == ["v3" if v3 else "v1"]
    with pytest.raises(ExampleProblem, match=r"ends with the user"):
        form.encode(Example("line 1", messages[:4]))


def test_results_of_tools_stay_apart() -> None:
    form = MixtralForm(letters(v3=True), 1, 2)
    messages = [
        Message(SYSTEM, "S"), QUESTION, Message(ASSISTANT, "", tool_calls=(CALL,)),
        Message(same_text(TOOL), "7", tool_call_id="abcdefgh1"),
        Message(same_text(TOOL), "é", tool_call_id="abcdefgh2"), ANSWER, QUESTION,
    ]  # fmt: skip
    tools = ({"function": FUNCTION},)
    assert read(form.prompt(messages, tools)) == (
        '<s>[INST]a[/INST][TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefgh1"}]</s>'
        '[TOOL_RESULTS]{"content": 7, "call_id": "abcdefgh1"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS]{"content": "é", "call_id": "abcdefgh2"}[/TOOL_RESULTS]b</s>'
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]'
        "[/AVAILABLE_TOOLS][INST]S\n\na[/INST]"
    )


@pytest.mark.parametrize("missing", V3_TOKENS)
def test_each_control_token_is_needed_for_v3(missing: str) -> None:
    encoder = letters(v3=True)
    assert MixtralForm(encoder, 1, 2).is_v3
    del encoder.control[missing]
    assert not MixtralForm(encoder, 1, 2).is_v3


@pytest.mark.parametrize(("behind", "adds"), [([5], True), ([4], False), ([6], False), ([5, 5], False), ([], False)])
def test_who_adds_the_blank(behind: list[int], adds: bool) -> None:
    """A tokenizer adds it if a text alone has the ids that it has behind [/INST] and a blank."""
    known = {"a": [5], "[/INST]": [7, 8], "[/INST] a": [7, 8, *behind]}
    assert MixtralForm(letters(known), 1, 2).adds_blank is adds


@pytest.mark.parametrize(
    ("both", "answer"), [([3, 4, 9], [9]), ([3, 5, 9], [77]), ([3, 3, 9], [77]), ([3], [77]), ([3, 4], [])]
)
def test_an_answer_is_what_follows_the_ids_of_its_question(both: list[int], answer: list[int]) -> None:
    form = MixtralForm(letters({"q": [3, 4], "q x": both, "x": [77]}), 1, 2)
    assert form._answer_v1("q", "x") == answer
    form.adds_blank = True
    assert form._answer_v1("q", "x") == [77]


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ([], [Message(USER, "")]),
        ([Message(SYSTEM, "s")], [Message(USER, "")]),
        ([QUESTION], [QUESTION]),
        ([ANSWER], [Message(USER, ""), ANSWER]),
        ([Message(TOOL, "t"), Message(TOOL, "u")], [Message(USER, ""), Message(TOOL, "t"), Message(TOOL, "u")]),
        (
            [Message(USER, "a", True, name="x"), Message(USER, "", False, name="y"), Message(USER, "b", False)],
            [Message(USER, "a\n\nb", True, name="x")],
        ),
        (
            [QUESTION, ANSWER, Message(ASSISTANT, "c", False), Message(ASSISTANT, "d", False), ANSWER],
            [QUESTION, ANSWER, Message(ASSISTANT, "c\n\nd", False), ANSWER],
        ),
        (
            [QUESTION, Message(ASSISTANT, "", tool_calls=(CALL,)), Message(ASSISTANT, "", tool_calls=(CALL, CALL))],
            [QUESTION, Message(ASSISTANT, "", tool_calls=(CALL, CALL, CALL))],
        ),
        ([QUESTION, Message(SYSTEM, "s"), QUESTION], [QUESTION, QUESTION]),
    ],
)
def test_adjacent_messages_of_one_role_are_one(given: list[Message], turns: list[Message]) -> None:
    assert list(mixtral_form._merged(given)) == turns


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([QUESTION, ANSWER], ({"function": FUNCTION},)),
        ([QUESTION, Message(ASSISTANT, "", tool_calls=(CALL,))], ()),
        ([QUESTION, Message(same_text(TOOL), "7"), ANSWER], ()),
    ],
)
def test_the_first_tokenizer_has_no_tools(messages: list[Message], tools: Any) -> None:
    with pytest.raises(ExampleProblem) as caught:
        MixtralForm(letters(), 1, 2).prompt(messages, tools)
    assert caught.value.problem == (
        "tools: Mixtral-Instruct's form has none for this tokenizer; a model with tools has its own template, "
        "or give one with --chat-template FILE"
    )


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        ({"type": "a", "function": FUNCTION}, 'tools: expected {"type": "function", "function": …}; found {'),
        ({"type": "x", "function": FUNCTION}, 'tools: expected {"type": "function", "function": …}; found {'),
        ({"type": "function", "function": "f"}, 'tools: expected {"type": "function", "function": …}; found {'),
        ({"function": FUNCTION, "more": 1}, 'tools: expected {"type": "function", "function": …}; found {'),
        ({"function": FUNCTION | {"z": 1, "b": 2}},
         "tools: Mixtral-Instruct's form has no key 'b', 'z' of a function"),
        ({"function": {"name": "f"}}, "tools: expected 'name' and 'parameters' of a function"),
        ({"function": {"parameters": {}}}, "tools: expected 'name' and 'parameters' of a function"),
        ({"function": {"name": 3, "parameters": {}}}, "tools: expected 'name' and 'parameters' of a function"),
        ({"function": {"name": "f", "parameters": []}}, "tools: expected 'name' and 'parameters' of a function"),
    ],
)  # fmt: skip
def test_each_part_of_a_tool_is_checked(tool: dict[str, Any], problem: str) -> None:
    with pytest.raises(ExampleProblem) as caught:
        mixtral_form._tool(tool)
    assert caught.value.problem.startswith(problem)


def test_tools_as_the_form_has_them() -> None:
    expected = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    assert mixtral_form._tool({"function": FUNCTION}) == expected
    described = FUNCTION | {"description": None, "strict": True}
    assert mixtral_form._tool({"type": same_text("function"), "function": described}) == expected
    assert mixtral_form._tool({"function": FUNCTION | {"description": "d"}})["function"]["description"] == "d"


@pytest.mark.parametrize("call", [{}, {"function": 3}, {"function": {}}, {"function": {"name": 3}}])
def test_a_call_needs_a_function_with_a_name(call: dict[str, Any]) -> None:
    with pytest.raises(ExampleProblem) as caught:
        mixtral_form._tool_call({"id": "abcdefgh1", **call})
    assert caught.value.problem.startswith("tool calls: expected a function with a name; found {'id': 'abcdefgh1'")


@pytest.mark.parametrize(
    ("given", "value"),
    [("", {}), ('{"a": 1}', {"a": 1}), ("{", "{"), ("[" * 100_000, "[" * 100_000), ({"a": 1}, {"a": 1}), ("3", 3)],
)
def test_values_of_texts(given: object, value: object) -> None:
    assert mixtral_form._parsed(given) == value


@pytest.mark.parametrize("number", [None, 5, "", "abcdefgh", "abcdefghij", "abcdefgh-", "abcdefghé"])
def test_a_call_has_a_number_of_nine_letters_or_digits(number: object) -> None:
    assert mixtral_form._call_id("aZ0123456") == "aZ0123456"
    with pytest.raises(ExampleProblem, match=r"expects nine letters or digits; found (null|5|\")"):
        mixtral_form._call_id(number)


def test_values_that_are_too_deep_are_a_problem_of_the_example() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ExampleProblem, match="tools: not JSON: "):
        mixtral_form._json(deep)


def test_an_answer_has_a_text_or_calls() -> None:
    form = MixtralForm(letters(v3=True), 1, 2)
    assert read(form._answer_v3(Message(ASSISTANT, " b \n  "))) == " b \n"
    assert read(form._answer_v3(Message(ASSISTANT, "", tool_calls=(CALL,)))).startswith("[TOOL_CALLS][{")
    with pytest.raises(ExampleProblem) as caught:
        form._answer_v3(Message(ASSISTANT, "b", tool_calls=(CALL,)))
    assert caught.value.problem == "an answer has a text and tool calls; Mixtral-Instruct's form has one of them"

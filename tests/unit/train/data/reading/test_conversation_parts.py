"""Conversations and shapes: each branch of a problem, each role, calls of tools, and texts of several parts."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_run.train.data.reading import shapes
from mixtral_run.train.data.reading.conversations import Turns, finish_turns, half_of_a_surrogate, read_turns
from mixtral_run.train.data.reading.example import Message
from mixtral_run.train.data.reading.shapes import convert

S, U, A, T = "system", "user", "assistant", "tool"
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def turns(*entries: dict[str, Any]) -> Turns:
    return read_turns(list(entries), "messages")


@pytest.mark.parametrize(
    ("first", "expected"),
    [(U, [(S, "s"), (U, "a"), (A, "b")]), (S, [(S, "a"), (U, "c"), (A, "b")])],
)
def test_a_system_text_beside_messages_comes_first_unless_they_have_one(first: str, expected: Any) -> None:
    given = [{"role": first, "content": "a"}, {"role": A, "content": "b"}]
    given[1:1] = [{"role": U, "content": "c"}] if first == S else []
    found = convert({"messages": given, "system": "s"})
    assert [(each.role, each.content) for each in found.messages] == expected
    assert found.unused == ({"system"} if first == S else set())


@pytest.mark.parametrize("role", [A, T])
def test_a_system_text_is_put_before_any_other_first_message(role: str) -> None:
    found = convert({"messages": [{"role": role, "content": "x"}, {"role": A, "content": "b"}], "system": "s"})
    assert found.problems[0].startswith("'messages': expected the user") and "found system, " in found.problems[0]


@pytest.mark.parametrize(
    ("text", "is_rendering"),
    [("### c", True), ("### b", False), ("### d", True), ("other", False), (" ", False)],
)
def test_a_text_that_has_the_last_message_is_a_rendering(text: str, is_rendering: bool) -> None:
    """The messages are a, b and c; of ShareGPT's the last is d."""
    messages = [{"role": role, "content": content} for role, content in ((U, "a"), (A, "b"), (A, " c "))]
    values = [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]
    for record in ({"messages": messages}, {"conversations": values}):
        last = "c" if "messages" in record else "d"
        assert (len(shapes.shapes_of({**record, "text": text})) == 1) is (is_rendering and last in text)
    for empty in ([], [3], [{"role": A, "content": " "}], [{"role": A}]):
        assert len(shapes.shapes_of({"messages": empty, "text": text})) == 2


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "3", '{"arguments": 1}', '[{"name": "f", "arguments": 3}]'])
def test_a_call_as_text_that_is_none(text: str) -> None:
    found = turns({"from": "function_call", "value": text})
    assert len(found.problems) == 1 and found.problems[0].startswith("message 1: 'value': ")


def test_calls_and_what_is_wrong_about_them() -> None:
    def calls(value: Any, role: str = A) -> Turns:
        return turns({"role": role, "content": "", "tool_calls": value} if role == A else
                     {"role": role, "content": "x", "tool_calls": value})  # fmt: skip

    assert calls([CALL]).messages[0].tool_calls == (CALL,) and calls([CALL]).problems == []
    assert calls(3).problems == ["message 1: 'tool_calls': expected a list; found a number"]
    wrong = ({"function": {"name": 3}}, {"function": {"name": "f", "arguments": 3}}, 3, {"function": 3})
    assert all(len(calls([CALL, each]).problems) == 1 for each in wrong)
    half = {"function": {"name": "f", "arguments": "\ud83d"}}
    assert "half of a surrogate pair" in calls([half]).problems[0]
    found = calls([CALL], U)
    assert found.problems == [] and found.unused == {"messages: tool_calls of the user"}
    assert found.messages[0].tool_calls == ()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (["a", {"type": "text", "text": "b"}], "ab"),
        ([{"text": "a"}], "a"),
        ([{"type": "audio", "text": "a"}], None),
        ([{"type": "video", "text": "a"}], None),
        ([3], None),
        (("a", "b"), "ab"),
    ],
)
def test_parts_of_a_message_are_text(content: Any, text: str | None) -> None:
    found = turns({"role": U, "content": content})
    if text is None:
        assert found.problems[0].startswith("message 1: 'content': expected parts of the type 'text'; found ")
    else:
        assert [each.content for each in found.messages] == [text]


def test_an_order_of_roles_with_calls() -> None:
    def order(*roles: str) -> str:
        given = [Message(A, "", tool_calls=(CALL,)) if role == "call" else Message(role, "x") for role in roles]
        return "".join(finish_turns(Turns(given), "messages").problems).partition("(")[2]

    assert order(U, "call", T, T, A) == order(S, U, "call", T, A, U, A) == order(U, "call") == ""
    assert order(U, "call", U, A) == "message 3: expected tool after calls of tools)"
    assert order(U, "call", T, U, A) == "message 4: expected tool or assistant)"
    assert order(S, A) == "message 2: expected user)"
    assert order(U, A, S, A) == "message 3: expected user)"
    assert order(U, "call", A) == "message 3: expected tool after calls of tools)"
    assert order(U, T, A) == "message 2: expected assistant)"
    many = finish_turns(Turns([Message(U, "x")] * 30 + [Message(S, "x"), Message(A, "x")]), "messages").problems[0]
    assert many.partition("found ")[2] == f"{', '.join([U] * 30)}"[:80] + " (message 31: expected assistant)"


@pytest.mark.parametrize(
    "message",
    [
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "Function_Call", "value": {"name": "f", "arguments": {"a": 1}}},
        {"from": "function_call", "value": [{"name": "f", "arguments": {"a": 1}}]},
        {"role": A, "content": None, "function_call": {"name": "f", "arguments": {"a": 1}}},
    ],
)
def test_a_call_of_a_function_in_every_form(message: dict[str, Any]) -> None:
    found = turns(message)
    assert not found.problems and not found.unused
    (read,) = found.messages
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert (read.role, read.content, read.tool_calls) == (A, "", (call,))


def test_what_a_call_has_beside_its_arguments_is_not_used() -> None:
    found = turns({"from": "function_call", "value": '{"name": "f", "parameters": {"a": 1}}'})
    assert found.unused == {"messages: function.parameters"}
    user = turns({"role": U, "content": "a", "function_call": {"name": "f"}})
    assert user.unused == {"messages: function_call of the user"} and not user.messages[0].tool_calls


def test_adjacent_messages_of_one_role_are_taken_and_counted() -> None:
    def counted(*roles: str) -> int:
        found = finish_turns(Turns([Message(role, "x") for role in roles]), "messages")
        assert not found.problems, found.problems
        return found.num_adjacent

    assert counted(S, S, U, U, U, A, A) == 1 + 2 + 1
    assert counted(U, A, U, A, U, U) == 0, "what follows the last answer is left out"
    half = [Message(U, "a"), Message(A, "b", learned=False), Message(A, "c")]
    problem = finish_turns(Turns(half), "messages").problems[0]
    assert "message 3: adjacent answers of which one counts in the loss and the other does not" in problem
    several = finish_turns(Turns([Message(U, "a"), Message(A, "", True, (CALL,)), Message(T, "1"), Message(T, "2"),
                                  Message(A, "b")]), "messages")  # fmt: skip
    assert (several.problems, several.num_adjacent) == ([], 0), "each result of a tool is one of its own"


def test_messages_of_other_forms() -> None:
    name = turns({"role": T, "content": "", "name": 3, "tool_call_id": 7})
    assert (name.messages, name.unused) == ([Message(T, "", False, (), "7", "3")], set())
    both = turns({"role": U, "from": "gpt", "content": "a", "value": "b"})
    assert both.messages[0].role == U and both.messages[0].content == "a"
    odd = turns({"role": U, "value": "b"})
    assert odd.messages[0].content == "b"
    assert turns({"role": ["x" * 90]}).problems[0].endswith(f'found ["{"x" * 38}')
    assert turns({"role": S, "content": ""}).problems == []
    assert turns({"role": U, "content": "a"}, {"role": S, "content": ""}).problems == ["message 2: 'content' is empty"]
    unlearned = read_turns([{"role": A, "content": "a"}, {"role": A, "content": "b", "weight": 1}], "p", learned=False)
    assert [each.learned for each in unlearned.messages] == [False, True]
    assert half_of_a_surrogate("é\ud800") == "half of a surrogate pair, \\ud800, at character 2"
    assert half_of_a_surrogate("日本") is half_of_a_surrogate("abc") is None


def test_other_keys_and_what_would_take_them() -> None:
    def problem(**record: Any) -> str:
        (found,) = convert(record).problems
        return found.partition("; ")[2]

    assert (
        problem(prompt="a", answer="b")
        == "--field instruction=prompt --field response=answer would take it as instruction and response"
    )
    assert problem(instruction="a", answer="b").startswith("--field response=answer would take")
    assert problem(query="a", response="b").startswith("--field instruction=query would take")
    assert problem(query="a", solution=3).startswith("--field NAME=KEY names them, for ")
    assert problem(input="a", x=1).startswith("--field NAME=KEY")
    assert problem(rows=[]).startswith("--field NAME=KEY") and problem(rows=[1]).startswith("--field NAME=KEY")
    assert problem(rows=[{}]).startswith("if 'rows' is the list of examples")
    assert problem(instruction=3, rows=[{}]).startswith("instruction needs 'response', alpaca needs 'output'")
    assert problem(chosen="a", rejected="b").startswith("mixtral-run align learns from")
    assert problem(chosen="a", x="b").startswith("--field NAME")
    (long,) = convert({f"key{number:03d}": 1 for number in range(30)}).problems
    keys = ", ".join(f"'key{number:03d}'" for number in range(30))[:120]
    assert long.startswith(f"the keys fit no shape: {keys}; ")


@pytest.mark.parametrize("tools", ["", " ", None, []])
def test_no_tools(tools: Any) -> None:
    record = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b"}], "tools": tools}
    assert (convert(record).tools, convert(record).problems) == ((), [])


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("{", "expected a list, or JSON text of one; found other text"),
        ("[" * 100_000, "expected a list, or JSON text of one; found other text"),
        ("3", "expected a list of objects"),
        ([3], "expected a list of objects"),
        ([{"a": "\ud83d"}], "half of a surrogate pair, \\ud83d, at character 9"),
    ],
)
def test_tools_that_are_none(tools: Any, problem: str) -> None:
    record = {"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b"}], "tools": tools}
    assert convert(record).problems == [f"'tools': {problem}"]

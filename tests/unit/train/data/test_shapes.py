"""Shapes: which texts of a record are the task and what is learned, and what is refused or not used."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_run.config.data import SHAPES
from mixtral_run.train.data.reading.example import Message
from mixtral_run.train.data.reading.shapes import Converted, convert

S, U, A, T = "system", "user", "assistant", "tool"
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def taken(record: dict[str, Any], **options: Any) -> Converted:
    found = convert(record, **options)
    assert found.problems == [], found.problems
    return found


def short(found: Converted) -> list[tuple[str, str]]:
    """Role and content of each message."""
    return [(message.role, message.content) for message in found.messages]


def learned(found: Converted) -> list[str]:
    return [message.content for message in found.messages if message.role == A and message.learned]


ONE_TURN = [
    ("instruction", {"instruction": "a", "response": "b"}, [(U, "a"), (A, "b")], set()),
    ("instruction", {"instruction": "a", "input": "x", "response": "b"}, [(U, "a\n\nx"), (A, "b")], set()),
    ("instruction", {"instruction": "a", "response": "b", "id": 7}, [(U, "a"), (A, "b")], {"id"}),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, [(U, "a"), (A, "b")], set()),
    ("alpaca", {"instruction": "a\n", "input": "\n  x\n", "output": "b"}, [(U, "a\n\n  x"), (A, "b")], set()),
    ("alpaca", {"instruction": "a", "output": "b", "system": "s", "history": []}, [(S, "s"), (U, "a"), (A, "b")],
     {"history"}),
    ("alpaca", {"instruction": "a", "output": "b", "text": "### a\n### b"}, [(U, "a"), (A, "b")], {"text"}),
    ("dolly", {"instruction": "a", "context": "c", "response": "b", "category": "qa"}, [(U, "a\n\nc"), (A, "b")],
     {"category"}),
    ("dolly", {"instruction": "a", "context": "", "response": "b"}, [(U, "a"), (A, "b")], set()),
    ("instruction", {"instruction": "a", "context": None, "response": "b"}, [(U, "a"), (A, "b")], set()),
    ("prompt", {"prompt": " a\n", "completion": " b"}, [(U, " a\n"), (A, " b")], set()),
    ("prompt", {"prompt": "a", "completion": "b", "context": "c"}, [(U, "a"), (A, "b")], {"context"}),
    ("question", {"question": "a", "answer": "b", "context": "c"}, [(U, "a\n\nc"), (A, "b")], set()),
    ("question", {"question": "a", "answer": "b", "messages": None}, [(U, "a"), (A, "b")], set()),
    ("instruction", {"instruction": "f(x):", "response": "    return x + 1"}, [(U, "f(x):"), (A, "    return x + 1")],
     set()),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "record", "messages", "unused"), ONE_TURN)
def test_one_turn(shape: str, record: dict[str, Any], messages: list[tuple[str, str]], unused: set[str]) -> None:
    found = taken(record)
    assert (found.shape, short(found), found.unused) == (shape, messages, unused)
    assert [message.learned for message in found.messages] == [role == A for role, _ in messages]


def test_plain_text_is_taken_as_it_stands() -> None:
    found = taken({"text": " a\nb ", "meta": {"url": "x"}})
    assert (found.shape, found.text, found.messages, found.unused) == ("text", " a\nb ", (), {"meta"})


def messages(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


CONVERSATIONS = [
    (messages((U, "a"), (A, "b"), (U, "c"), (A, "d")), [(U, "a"), (A, "b"), (U, "c"), (A, "d")]),
    (messages((S, "s"), (U, "a"), (A, "b")), [(S, "s"), (U, "a"), (A, "b")]),
    (messages(("developer", "s"), (U, "a"), (A, "b")), [(S, "s"), (U, "a"), (A, "b")]),
    (messages((S, ""), (U, "a"), (A, "b")), [(U, "a"), (A, "b")]),
    (messages((S, " \n"), (U, "a"), (A, "b")), [(U, "a"), (A, "b")]),
    (messages((S, None), (U, "a"), (A, "b")), [(U, "a"), (A, "b")]),
    (messages((S, []), (U, "a"), (A, "b")), [(U, "a"), (A, "b")]),
    (messages((U, [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), (A, "c")), [(U, "a b"), (A, "c")]),
    (messages((U, "a"), (A, "b"), system="s"), [(S, "s"), (U, "a"), (A, "b")]),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [(U, "a"), (A, "b")]),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"},
      {"from": "ChatGPT", "value": "b"}], "system": ""}, [(S, "s"), (U, "a"), (A, "b")]),
    ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     [(U, "a"), (A, "b")]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), CONVERSATIONS)
def test_conversations(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = taken(record)
    assert found.shape == ("messages" if "messages" in record else "sharegpt")
    assert short(found) == expected
    assert learned(found) == [content for role, content in expected if role == A]
    assert (found.num_trimmed, found.unused - {"system"}) == (0, set())


def test_calls_of_tools_are_kept() -> None:
    asked = {"role": A, "content": None, "tool_calls": [CALL]}
    told = {"role": T, "content": "2", "tool_call_id": "c1", "name": "add"}
    record = {"messages": [{"role": U, "content": "1+1"}, asked, told, {"role": A, "content": "2."}], "tools": TOOLS}
    found = taken(record)
    assert found.messages == (
        Message(U, "1+1", False), Message(A, "", True, (CALL,)), Message(T, "2", False, (), "c1", "add"),
        Message(A, "2.", True),
    )  # fmt: skip
    assert found.tools == tuple(TOOLS) and not found.unused
    as_text = taken({**record, "tools": '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'})
    assert as_text == found
    value = '{"name": "add", "arguments": {"a": 1}}'
    share = [{"from": "human", "value": "1+1"}, {"from": "function_call", "value": value},
             {"from": "observation", "value": "2"}, {"from": "gpt", "value": "2."}]  # fmt: skip
    found = taken({"conversations": share})
    assert short(found) == [(U, "1+1"), (A, ""), (T, "2"), (A, "2.")]
    assert found.messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_weight_and_train_decide_what_is_learned() -> None:
    told = messages((U, "2+2?"), (A, "5"), (U, "No."), (A, "4"), (U, "Sure?"), (A, "Yes."), (U, "Ok?"), (A, "Ok."))
    for at, more in {
        1: {"weight": 0},
        3: {"weight": 1},
        5: {"train": False},
        7: {"train": True, "weight": 1.0},
    }.items():
        told["messages"][at] |= more
    assert learned(taken(told)) == ["4", "Ok."]
    told["messages"][0]["weight"] = 0
    assert not taken(told).unused
    told["messages"][0]["train"], told["messages"][0]["weight"] = True, None
    assert taken(told).unused == {"messages: weight or train of the user"}


def test_the_completion_of_a_list_is_learned_alone() -> None:
    prompt = messages((U, "a"), (A, "b"), (U, "c"))["messages"]
    found = taken({"prompt": prompt, "completion": [{"role": A, "content": "d"}], "score": 1})
    assert short(found) == [(U, "a"), (A, "b"), (U, "c"), (A, "d")]
    assert (learned(found), found.shape, found.unused) == (["d"], "prompt", {"score"})


def test_what_follows_the_last_answer_is_trimmed_and_counted() -> None:
    found = taken(messages((U, "a"), (A, "b"), (U, "c")))
    assert (short(found), found.num_trimmed) == ([(U, "a"), (A, "b")], 1)
    found = convert(messages((S, "s"), (U, "a")))
    assert "an answer of the assistant; found system, user" in found.problems[0]


def test_keys_of_messages_that_are_not_used_are_named() -> None:
    record = messages((U, "a"), (A, "b"))
    record["messages"][0] |= {"name": "x", "date": None}
    record["messages"][1] |= {"refusal": "no"}
    assert taken(record).unused == {"messages: name", "messages: refusal"}


IN_TURN = "'messages': expected the user and the assistant in turn, with an answer of the assistant; found "


@pytest.mark.parametrize(
    ("record", "problems"),
    [
        ({"messages": 3}, ["'messages': expected a list; found a number"]),
        ({"messages": []}, [IN_TURN + "none"]),
        ({"messages": ["a"]}, ["message 1: expected a JSON object; found text"]),
        (messages((A, "a"), (U, "b")), [IN_TURN + "assistant, user (message 1: expected user)"]),
        (messages((U, "a"), (A, "b"), (S, "c"), (A, "d")), [
            IN_TURN + "user, assistant, system, assistant (message 3: expected user)"]),
        (messages((U, "a"), (S, "b"), (A, "c")), [IN_TURN]),
        (messages((U, "a"), (T, "b"), (A, "c")), [IN_TURN]),
        (messages((U, "a"), ("root", "b")), ["message 2: 'role': expected system, developer, user, human"]),
        ({"messages": [{"role": U, "content": ""}, {"content": 3}]}, [
            "message 1: 'content' is empty",
            "message 2: 'role': expected system",
        ]),
        (messages((U, "a"), (A, 3)), ["message 2: 'content': expected text; found a number"]),
        (messages((U, [{"type": "image_url", "image_url": "x"}]), (A, "b")), [
            "message 1: 'content': expected parts of the type 'text'; found \"image_url\""]),
        ({"messages": [
            {"role": U, "content": [{"type": "text", "text": 7}]}, {"role": A, "content": [{"type": "text"}]}]},
         ["message 1: 'content': expected text under 'text' of each part; found a number",
          "message 2: 'content': expected text under 'text' of each part; found nothing"]),
        ({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", "weight": 0.5}]}, [
            "message 2: 'weight': expected 0 or 1; found 0.5"]),
        ({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", "weight": "0"}]}, [
            "message 2: 'weight': expected 0 or 1; found \"0\""]),
        ({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", "train": 0}]}, [
            "message 2: 'train': expected true or false; found 0"]),
        ({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "b", "train": False}]}, [
            "'messages': expected an answer that counts in the loss; found 'weight' 0 or 'train' false on every one"]),
        ({"messages": [{"role": U, "content": "a"}, {"role": A, "content": "", "tool_calls": [{"id": 1}]}]}, [
            "message 2: 'tool_calls': expected {'id', 'type', 'function': {'name', 'arguments'}}"]),
        ({"instruction": "a", "response": 3}, ["'response': expected text; found a number"]),
        ({"instruction": ["a"], "response": " \n"}, ["'instruction': expected text; found a list",
                                                       "'response' is empty"]),
        ({"instruction": "a", "response": True}, ["'response': expected text; found true or false"]),
        ({"instruction": "a", "response": "b", "input": 3}, ["'input': expected text; found a number"]),
        ({"question": "cut \ud83d here", "answer": "b"}, [
            "'question': half of a surrogate pair, \\ud83d, at character 5"]),
        (messages((U, "a"), (A, "x\udc00")), [
            "message 2: 'content': half of a surrogate pair, \\udc00, at character 2"]),
        ({"text": ""}, ["'text' is empty"]),
        (messages((U, "a"), (A, "b"), tools=3), ["'tools': expected a list of objects"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(record: dict[str, Any], problems: list[str]) -> None:
    found = convert(record).problems
    assert len(found) == len(problems), found
    assert all(mine.startswith(problem) for mine, problem in zip(found, problems, strict=True)), found


@pytest.mark.parametrize(
    ("record", "shapes"),
    [
        ({"instruction": "a", "response": "b", "messages": []}, ("instruction", "messages")),
        ({"instruction": "a", "response": "b", "output": "c"}, ("instruction", "alpaca")),
        ({"prompt": "a", "completion": "b", "question": "c", "answer": "d"}, ("prompt", "question")),
        ({"messages": [], "conversations": []}, ("messages", "sharegpt")),
        ({"text": "another", "instruction": "a", "output": "b"}, ("alpaca", "text")),
    ],
)
def test_two_shapes_are_refused_with_both_names(record: dict[str, Any], shapes: tuple[str, str]) -> None:
    (problem,) = convert(record).problems
    assert all(f"{shape} (" in problem for shape in shapes) and f"--data-format {'|'.join(shapes)} chooses" in problem


def test_the_format_chooses_and_what_it_does_not_use_is_counted() -> None:
    record = {"instruction": "a", "response": "b", "text": "c"}
    assert taken(record, data_format="text").unused == {"instruction", "response"}
    assert taken(record, data_format="instruction").unused == {"text"}
    assert taken(record, data_format="dolly").shape == "dolly"
    assert convert(record, data_format="alpaca").problems == [
        "'output' is missing; the keys are 'instruction', 'response', 'text'"
    ]
    for shape in SHAPES:
        assert convert({"other": 1}, data_format=shape).problems


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"query": "a", "solution": "b"}, "--field instruction=query --field response=solution would take it"),
        ({"instruction": "a", "other": "b"}, "instruction needs 'response', alpaca needs 'output'"),
        ({"rows": [{"a": 1}], "n": 2}, "jq -c '.[\"rows\"][]' FILE"),
        ({"x": 1}, "--field NAME=KEY names them"),
        ({}, "the keys fit no shape: none"),
    ],
)
def test_other_keys_get_the_way_to_take_them(record: dict[str, Any], words: str) -> None:
    (problem,) = convert(record).problems
    assert words in problem


def test_fields_name_other_keys() -> None:
    fields = {"question": "query", "answer": "answers.text"}
    found = taken({"query": "a", "answers": {"text": "b", "start": 3}, "id": 1}, fields=fields)
    assert (short(found), found.unused) == ([(U, "a"), (A, "b")], {"answers.start", "id"})
    swapped = taken(
        {"instruction": "b", "response": "a"}, fields={"instruction": "response", "response": "instruction"}
    )
    assert short(swapped) == [(U, "a"), (A, "b")]
    replaced = taken({"instruction": "old", "response": "b", "new": "a"}, fields={"instruction": "new"})
    assert (short(replaced)[0], len(replaced.unused)) == ((U, "a"), 1)

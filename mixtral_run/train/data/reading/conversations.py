"""Messages of conversations, as OpenAI's API and ShareGPT write them, to Message. Standard library only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, TOOL, USER, Message
from mixtral_run.train.data.reading.json_values import read_json, unwritable_number
from mixtral_run.train.data.reading.records import json_type

ROLE_NAMES = {
    "system": SYSTEM, "developer": SYSTEM,
    "user": USER, "human": USER, "prompter": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT,
    "model": ASSISTANT, "function_call": ASSISTANT,
    "tool": TOOL, "function": TOOL, "observation": TOOL, "function_response": TOOL,
}  # fmt: skip
"""Names of roles in the data, of OpenAI's API and of ShareGPT."""
_CALL = "function_call"
"""The role of ShareGPT whose text is a call of a function."""
_CALL_KEYS = frozenset({"name", "arguments"})
_USED = frozenset({"role", "from", "content", "value", "tool_calls", "tool_call_id", "weight", "train", _CALL})


@dataclass(slots=True)
class Turns:
    """Messages as they were read, with what is wrong about them and what is not used.

    Attributes:
        messages: valid only if there are no problems.
        problems: a line each.
        unused: keys of messages that are not used.
        num_trimmed: messages after the assistant's last one, which are left out.
        num_adjacent: messages that follow one of the same role. The chat template decides whether they are joined.
    """

    messages: list[Message] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)
    num_trimmed: int = 0
    num_adjacent: int = 0


def read_turns(entries: object, key: str, *, learned: bool = True) -> Turns:
    """Read the messages under `key`, without checking their order. learned: whether the assistant's count in the loss,
    unless a message has a weight.
    """
    turns = Turns()
    if not isinstance(entries, (list, tuple)):
        turns.problems.append(f"{key!r}: expected a list; found {json_type(entries)}")
        return turns
    for number, entry in enumerate(entries, start=1):
        where = f"message {number}"
        if isinstance(entry, dict):
            _read_message(entry, where, key, learned, turns)
        else:
            turns.problems.append(f"{where}: expected a JSON object; found {json_type(entry)}")
    return turns


def finish_turns(turns: Turns, key: str) -> Turns:
    """Trim what follows the assistant's last message, and check the order of the roles."""
    if turns.problems:
        return turns
    messages = turns.messages
    roles = [message.role for message in messages]
    while messages and messages[-1].role != ASSISTANT:
        messages.pop()
        turns.num_trimmed += 1
    order = _order_problem(messages)
    if not messages or order:
        found = ", ".join(roles) or "none"
        expected = "the user and the assistant in turn, with an answer of the assistant"
        turns.problems.append(f"{key!r}: expected {expected}; found {found[:80]}{order}")
    elif not any(message.learned for message in messages if message.role == ASSISTANT):
        turns.problems.append(
            f"{key!r}: expected an answer that counts in the loss; found 'weight' 0 or 'train' false on every one"
        )
    turns.num_adjacent = sum(one.role == other.role != TOOL for one, other in itertools.pairwise(messages))
    return turns


def _order_problem(messages: Sequence[Message]) -> str:
    """Return the first place where the order of roles is broken, or nothing.

    Adjacent messages of one role are allowed, as in mistral-common. Two answers of which one is learned are not: one
    answer cannot be learned in part.
    """
    before: Message | None = None
    for number, message in enumerate(messages, start=1):
        expected, why = _expected_after(before)
        is_same = message.role == (before.role if before is not None else SYSTEM)
        if message.role not in expected and (why or not is_same):
            return f" (message {number}: expected {' or '.join(expected)}{why})"
        if before is not None and message.role == before.role == ASSISTANT and message.learned != before.learned:
            return f" (message {number}: adjacent answers of which one counts in the loss and the other does not)"
        before = message
    return ""


def _expected_after(before: Message | None) -> tuple[tuple[str, ...], str]:
    """Return the roles that are expected after a message, and words about the reason. None: before the first one."""
    if before is not None and before.role == ASSISTANT and before.tool_calls:
        return (TOOL,), " after calls of tools"
    role = SYSTEM if before is None else before.role
    return {SYSTEM: (USER,), USER: (ASSISTANT,), TOOL: (TOOL, ASSISTANT), ASSISTANT: (USER,)}[role], ""


def _read_message(entry: Mapping[str, Any], where: str, key: str, learned: bool, turns: Turns) -> None:
    values = {name: value for name, value in entry.items() if value is not None}
    name = "from" if "from" in values and "role" not in values else "role"
    given = values.get(name)
    role = ROLE_NAMES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        shown = json.dumps(given, default=str)[:40]
        turns.problems.append(f"{where}: {name!r}: expected {', '.join(ROLE_NAMES)}; found {shown}")
        return
    turns.unused |= {f"{key}: {each}" for each in values if each not in _USED and not (each == "name" and role == TOOL)}
    content_key = "content" if "content" in values or "value" not in values else "value"
    content, problem = "", None
    calls: tuple[Mapping[str, Any], ...] = ()
    if str(given).lower() == _CALL:
        calls, problem = _call_of(values.get(content_key))
    else:
        content, problem = _content(values.get(content_key))
        calls = _calls_beside(values, role, where, key, turns)
    turns.unused |= {f"{key}: function.{each}" for call in calls for each in call["function"] if each not in _CALL_KEYS}
    if problem is None and not content.strip() and role != TOOL and not calls and not _has_calls(values, role):
        if role == SYSTEM and not turns.messages:
            return  # Exports of chats have an empty system message.
        problem = "is empty"
    problem = problem or half_of_a_surrogate(content)
    if problem is not None:
        turns.problems.append(f"{where}: {content_key!r}{'' if problem.startswith('is ') else ':'} {problem}")
    problems, counts = _weight(values, where)
    turns.problems += problems
    if counts is not None and role != ASSISTANT and counts:
        turns.unused.add(f"{key}: weight or train of the {role}")
    is_learned = role == ASSISTANT and (learned if counts is None else counts)
    turns.messages.append(
        Message(
            role, content, is_learned, calls,
            str(values["tool_call_id"]) if role == TOOL and "tool_call_id" in values else None,
            str(values["name"]) if role == TOOL and "name" in values else None,
        )
    )  # fmt: skip


def _has_calls(values: Mapping[str, Any], role: str) -> bool:
    return role == ASSISTANT and any(values.get(name) for name in ("tool_calls", _CALL))


def _calls_beside(
    values: Mapping[str, Any], role: str, where: str, key: str, turns: Turns
) -> tuple[Mapping[str, Any], ...]:
    """Return an assistant's calls under `tool_calls`, or OpenAI's former `function_call`; add problems."""
    name = "tool_calls" if values.get("tool_calls") else _CALL
    if not values.get(name):
        return ()
    if role != ASSISTANT:
        turns.unused.add(f"{key}: {name} of the {role}")
        return ()
    calls, problem = _tool_calls(values[name]) if name != _CALL else _call_of(values[name])
    turns.problems += [f"{where}: {name!r}: {problem}"] if problem else []
    return calls


def _content(content: object) -> tuple[str, str | None]:
    """Return the text of a message's content, a text or a list of parts, and what is wrong about it."""
    if content is None:
        return "", None
    if isinstance(content, str):
        return content, None
    if not isinstance(content, (list, tuple)):
        return "", f"expected text; found {json_type(content)}"
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and part.get("type", "text") == "text":
            kind = "nothing" if "text" not in part else json_type(part["text"])
            return "", f"expected text under 'text' of each part; found {kind}"
        else:
            found = part.get("type") if isinstance(part, dict) else part
            return "", f"expected parts of the type 'text'; found {json.dumps(found, default=str)[:40]}"
    return "".join(texts), None


def _weight(values: Mapping[str, Any], where: str) -> tuple[list[str], bool | None]:
    """Return the problems of `weight` and `train`, and whether the message is learned; None if neither is given."""
    problems = []
    weight, train = values.get("weight"), values.get("train")
    if weight is not None and not (isinstance(weight, (int, float)) and weight in (0, 1)):
        problems.append(f"{where}: 'weight': expected 0 or 1; found {json.dumps(weight, default=str)[:40]}")
    if train is not None and not isinstance(train, bool):
        problems.append(f"{where}: 'train': expected true or false; found {json.dumps(train, default=str)[:40]}")
    if weight is None and train is None:
        return problems, None
    return problems, bool(1 if weight is None else weight) and bool(True if train is None else train)


def _tool_calls(calls: object) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    """Return an assistant's calls of tools, and what is wrong about them."""
    if not isinstance(calls, (list, tuple)):
        return (), f"expected a list; found {json_type(calls)}"
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return (), "expected {'id', 'type', 'function': {'name', 'arguments'}}"
        arguments = function.get("arguments", {})
        if not isinstance(arguments, (str, dict)):
            return (), f"'arguments': expected text or an object; found {json_type(arguments)}"
        if problem := half_of_a_surrogate(json.dumps(function, ensure_ascii=False, default=str)):
            return (), problem
        if number := unwritable_number(function):
            return (), f"expected JSON; found {number}"
    return tuple(calls), None


def _call_of(value: object) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    """Return the calls that ShareGPT's `function_call` holds: an object, a list of objects, or JSON text of them."""
    function = value
    if isinstance(value, str):
        try:
            function = read_json(value)
        except ValueError:
            return (), "expected a function's call as JSON"
    entries = function if isinstance(function, list) else [function]
    return _tool_calls([{"type": "function", "function": each} for each in entries])


def half_of_a_surrogate(text: str) -> str | None:
    """Return a problem if a text has half of a surrogate pair, which no tokenizer takes."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start + 1}"
    return None

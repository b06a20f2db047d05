"""Shapes of examples: which keys of a record hold what. Standard library only.

A shape is recognized by its keys. `instruction`, `alpaca`, `dolly`, `prompt` and `question` are one turn,
`messages` and `sharegpt` are conversations, `text` is plain text. A record that fits two shapes is refused, as learning
the wrong one would not be noticed. Keys that a shape does not use are counted.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixtral_run.config.data import AUTO, SHAPES
from mixtral_run.train.data.reading.conversations import Turns, finish_turns, half_of_a_surrogate, read_turns
from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, USER, Message
from mixtral_run.train.data.reading.json_values import read_json, unwritable_number
from mixtral_run.train.data.reading.records import json_type

TEXT, MESSAGES, SHAREGPT, PROMPT, DOLLY = "text", "messages", "sharegpt", "prompt", "dolly"
PASSAGES = ("input", "context")
"""Keys of the passage that a task is about. It follows the task after an empty line."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Shape of one turn: the keys of task and response, and whether a passage may follow the task."""

    task: str
    response: str
    has_passage: bool = True


_PAIRS = {
    "instruction": _Pair("instruction", "response"),
    "dolly": _Pair("instruction", "response"),
    "alpaca": _Pair("instruction", "output"),
    "prompt": _Pair("prompt", "completion", has_passage=False),
    "question": _Pair("question", "answer"),
}
_LISTS = {MESSAGES: "messages", SHAREGPT: "conversations"}
_TASK_WORDS = ("instruction", "prompt", "question", "query", "problem", "input")
_RESPONSE_WORDS = ("response", "output", "completion", "answer", "solution", "target", "answers", "chosen")

REQUIRED: dict[str, tuple[str, ...]] = {
    **{name: (pair.task, pair.response) for name, pair in _PAIRS.items()},
    DOLLY: ("instruction", "response", "context"),
    **{name: (key,) for name, key in _LISTS.items()},
    TEXT: (TEXT,),
}
"""Keys by which each shape is recognized. `--data-format dolly` does without the context."""


@dataclass(slots=True)
class Converted:
    """A record as the content of an example, or its problems.

    Attributes:
        shape: its name; None if there is none.
        messages: of a conversation or a turn.
        text: of plain text.
        tools: functions that the assistant may call.
        rejected, label: of preferences, as in Example.
        problems: lines; then the other values are not valid.
        unused: keys that are not used.
        num_trimmed: messages after the assistant's last one.
        num_adjacent: messages that follow one of the same role.
    """

    shape: str | None = None
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Message, ...] | None = None
    label: bool | None = None
    problems: list[str] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)
    num_trimmed: int = 0
    num_adjacent: int = 0


def convert(record: Mapping[str, Any], data_format: str = AUTO, fields: Mapping[str, str] | None = None) -> Converted:
    """Return the content of a record's example. `fields` maps keys of the shapes to the record's keys (--field)."""
    values, origins = renamed(record, fields or {})
    shapes = [data_format] if data_format != AUTO else shapes_of(values)
    if len(shapes) != 1:
        return Converted(problems=[_ambiguous(shapes) if shapes else _unknown(values)])
    shape = shapes[0]
    found = Converted(shape)
    if shape in _LISTS or (shape == PROMPT and isinstance(values.get("prompt"), (list, tuple))):
        used = _convert_conversation(values, shape, found)
    elif shape == TEXT:
        found.text = text_of(values, TEXT, found)
        used = {TEXT}
    else:
        used = _convert_pair(values, _PAIRS[shape], found)
    add_unused(found, record, values, used, origins)
    return found


def add_unused(
    found: Converted,
    record: Mapping[str, Any],
    values: Mapping[str, Any],
    used: Collection[str],
    origins: Mapping[str, str],
) -> None:
    """Add the keys of a record that are not used. values, origins: of `renamed`."""
    found.unused |= {origins.get(key, key) for key in values if key not in used}
    for key in origins.values():
        # Of an object that holds a field, the other keys are not used.
        found.unused |= _beside(record, key) if key not in record else set()
        found.unused -= {key.split(".")[0]} if key not in record else set()


def _beside(record: Mapping[str, Any], path: str) -> set[str]:
    root, _, rest = path.partition(".")
    inside = record[root]
    return {f"{root}.{key}" for key in inside if key != rest.split(".")[0]} if isinstance(inside, Mapping) else set()


def renamed(record: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values that are not null, by the keys of the shapes, and the record's key of each that was renamed."""
    values = {str(key): value for key, value in record.items() if value is not None}
    origins = {name: key for name, key in fields.items() if value_at(record, key) is not None}
    for key in origins.values():
        values.pop(key, None)
    for name, key in origins.items():
        if name in values:
            # The record's own key of that name is not the one that was asked for.
            values[f"{name}, in place of which --field takes {key}"] = values[name]
        values[name] = value_at(record, key)
    return values, origins


def value_at(record: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, or of a path of keys with dots (`answers.text`); None if there is none."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def shapes_of(values: Mapping[str, Any]) -> list[str]:
    """Return the shapes that the keys fit. Several are ambiguous.

    `dolly` is `instruction` with a context. A `text` that contains the response is a rendering of the example, as the
    released alpaca has it, and no second one.
    """
    found = [name for name in SHAPES if all(key in values for key in REQUIRED[name])]
    if DOLLY in found:
        found.remove("instruction")
    if TEXT in found and len(found) == 2 and _is_rendering(values, next(name for name in found if name != TEXT)):
        found.remove(TEXT)
    return found


def _is_rendering(values: Mapping[str, Any], shape: str) -> bool:
    """Return True if `text` contains the last text of the shape's own example."""
    text, last = values[TEXT], values[REQUIRED[shape][-1] if shape != DOLLY else "response"]
    if isinstance(last, list) and last and isinstance(last[-1], dict):
        last = last[-1].get("content") or last[-1].get("value")
    return isinstance(text, str) and isinstance(last, str) and bool(last.strip()) and last.strip() in text


def _ambiguous(shapes: list[str]) -> str:
    names = " and ".join(f"{name} ({', '.join(key for key in REQUIRED[name])})" for name in shapes)
    return f"the keys fit more than one shape: {names}; --data-format {'|'.join(shapes)} chooses"


IS_PREFERENCE = "mixtral-run align learns from 'chosen' and 'rejected'"
"""End of the problem of an example that only `align` takes."""


def _unknown(values: Mapping[str, Any]) -> str:
    """Return the problem of keys that fit no shape, with what the closest shapes lack, or the --field that helps."""
    keys = ", ".join(sorted(map(repr, values)))[:120] or "none"
    if "chosen" in values and "rejected" in values:
        return f"the keys fit no shape: {keys}; {IS_PREFERENCE}"
    near = [
        f"{name} needs {' and '.join(repr(key) for key in required if key not in values)}"
        for name, required in REQUIRED.items()
        if name != DOLLY and len(required) > 1 and any(key in values for key in required)
    ]
    task = next((key for key in _TASK_WORDS if isinstance(values.get(key), str)), None)
    response = next((key for key in _RESPONSE_WORDS if isinstance(values.get(key), str) and key != task), None)
    inner = next(
        (key for key, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)), None
    )
    if task and response:
        pairs = [
            f"--field {name}={key}" for name, key in (("instruction", task), ("response", response)) if name != key
        ]
        help_ = f"; {' '.join(pairs)} would take it as instruction and response"
    elif inner and len(values[inner]) > 0 and not near:
        help_ = f"; if {inner!r} is the list of examples, make lines of it: jq -c '.[{json.dumps(inner)}][]' FILE"
    else:
        help_ = f"; {', '.join(near)}" if near else f"; --field NAME=KEY names them, for {' or '.join(SHAPES)}"
    return f"the keys fit no shape: {keys}{help_}"


def _convert_pair(values: Mapping[str, Any], pair: _Pair, found: Converted) -> set[str]:
    """Convert one turn. Return the keys that are used."""
    task, response = text_of(values, pair.task, found), text_of(values, pair.response, found)
    used = {pair.task, pair.response, SYSTEM}
    passages = []
    for key in PASSAGES if pair.has_passage else ():
        used.add(key)
        if key in values and (passage := text_of(values, key, found, may_be_empty=True)).strip():
            passages.append(passage.strip("\n"))
    system = text_of(values, SYSTEM, found, may_be_empty=True) if SYSTEM in values else ""
    content = "\n\n".join([task.rstrip() if passages else task, *passages])
    turn = (Message(USER, content, learned=False), Message(ASSISTANT, response))
    found.messages = (Message(SYSTEM, system, learned=False), *turn) if system.strip() else turn
    return used


def text_of(values: Mapping[str, Any], key: str, found: Converted, *, may_be_empty: bool = False) -> str:
    """Return the text under a key, and add a problem if there is none."""
    value = values.get(key)
    if key not in values:
        keys = ", ".join(sorted(map(repr, values)))[:80] or "none"
        found.problems.append(f"{key!r} is missing; the keys are {keys}")
    elif not isinstance(value, str):
        found.problems.append(f"{key!r}: expected text; found {json_type(value)}")
    elif not value.strip() and not may_be_empty:
        found.problems.append(f"{key!r} is empty")
    elif problem := half_of_a_surrogate(value):
        found.problems.append(f"{key!r}: {problem}")
    else:
        return value
    return ""


def _convert_conversation(values: Mapping[str, Any], shape: str, found: Converted) -> set[str]:
    """Convert a conversation: one list, or a list for the prompt and one for the completion. Return the used keys."""
    if shape == PROMPT:
        turns = read_turns(values["prompt"], "prompt", learned=False)
        completion = read_turns(values.get("completion"), "completion")
        turns = Turns(
            turns.messages + completion.messages, turns.problems + completion.problems, turns.unused | completion.unused
        )
        used, key = {"prompt", "completion", "tools"}, "completion"
    else:
        key = _LISTS[shape]
        if key not in values:
            found.problems.append(
                f"{key!r} is missing; the keys are {', '.join(sorted(map(repr, values)))[:80] or 'none'}"
            )
            return {key}
        turns = read_turns(values[key], key)
        used = {key, "tools"}
    if SYSTEM in values and not (turns.messages and turns.messages[0].role == SYSTEM):
        system = text_of(values, SYSTEM, found, may_be_empty=True)
        used.add(SYSTEM)
        if system.strip():
            turns.messages.insert(0, Message(SYSTEM, system, learned=False))
    finish_turns(turns, key)
    found.problems += turns.problems
    found.unused |= turns.unused
    found.messages = tuple(turns.messages)
    found.num_trimmed, found.num_adjacent = turns.num_trimmed, turns.num_adjacent
    if "tools" in values:
        convert_tools(values["tools"], found)
    return used


def convert_tools(tools: object, found: Converted) -> None:
    """Convert the functions that the assistant may call: a list, or JSON text of one, as tables have it."""
    if isinstance(tools, str):
        if not tools.strip():
            return
        try:
            tools = read_json(tools)
        except ValueError:
            found.problems.append("'tools': expected a list, or JSON text of one; found other text")
            return
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        found.problems.append("'tools': expected a list of objects")
    elif problem := half_of_a_surrogate(json.dumps(tools, ensure_ascii=False, default=str)):
        found.problems.append(f"'tools': {problem}")
    elif number := unwritable_number(tools):
        found.problems.append(f"'tools': expected JSON; found {number}")
    else:
        found.tools = tuple(tools)

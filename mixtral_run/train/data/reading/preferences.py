"""Records of preferences to examples, in the shapes that TRL reads. Standard library only.

    pairs       prompt, chosen, rejected; without a prompt, chosen and rejected are whole conversations
    unpaired    prompt, completion, label

Prompts and answers are texts or lists of messages. A text is a turn of the user or of the assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mixtral_run.config.data import AUTO, PAIRS, UNPAIRED
from mixtral_run.train.data.reading.conversations import Turns, finish_turns, read_turns
from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, USER, Message
from mixtral_run.train.data.reading.records import json_type
from mixtral_run.train.data.reading.shapes import Converted, add_unused, convert_tools, renamed, text_of

PROMPT, CHOSEN, REJECTED, COMPLETION, LABEL = "prompt", "chosen", "rejected", "completion", "label"
_REQUIRED = {PAIRS: (CHOSEN, REJECTED), UNPAIRED: (COMPLETION, LABEL)}
_PAIR_LINE = '{"prompt": "What is 7 times 8?", "chosen": "56", "rejected": "54"}'
_LABEL_LINE = '{"prompt": "What is 7 times 8?", "completion": "56", "label": true}'
PREFERENCE_LINES = {PAIRS: (_PAIR_LINE,), UNPAIRED: (_LABEL_LINE, _PAIR_LINE)}
"""Examples of lines, for errors."""
_PROMPT_WORDS = ("question", "instruction", "query", "input")
_LABELS = {"true": True, "1": True, "false": False, "0": False}


def convert_preference(
    record: Mapping[str, Any], allowed: str, data_format: str = AUTO, fields: Mapping[str, str] | None = None
) -> Converted:
    """Return the content of a record's example.

    Args:
        record: its keys and values.
        allowed: pairs, or unpaired for pairs as well as single answers.
        data_format: pairs, unpaired or auto.
        fields: the record's key for each key of a shape that has another name there.
    """
    values, origins = renamed(record, fields or {})
    shape, problem = _shape_of(values, allowed, data_format)
    found = Converted(shape)
    if problem is not None:
        found.problems.append(problem)
        return found
    used = _convert_pair(values, found) if shape == PAIRS else _convert_single(values, found)
    if "tools" in values:
        used.add("tools")
        convert_tools(values["tools"], found)
    add_unused(found, record, values, used, origins)
    return found


def _shape_of(values: Mapping[str, Any], allowed: str, data_format: str) -> tuple[str, str | None]:
    """Return the shape of a record, and the problem if it has none or one that the method does not take."""
    fits = [name for name, keys in _REQUIRED.items() if all(key in values for key in keys)]
    keys = ", ".join(sorted(map(repr, values)))[:120] or "none"
    if data_format != AUTO:
        return data_format, _missing(data_format, values)
    if allowed == PAIRS and fits == [UNPAIRED]:
        return (
            UNPAIRED,
            "has one answer with a 'label', which --method kto learns from; expected 'chosen' and 'rejected'",
        )
    if allowed == PAIRS and UNPAIRED in fits:
        return PAIRS, None
    if len(fits) == 2:
        return PAIRS, "the keys fit pairs and unpaired answers; --data-format pairs|unpaired chooses"
    if fits:
        return fits[0], None
    near = [
        name
        for name, required in _REQUIRED.items()
        if any(key in values for key in required) and name in (PAIRS, allowed)
    ]
    if near:
        return near[0], _missing(near[0], values)
    wanted = "'prompt', 'chosen' and 'rejected'"
    wanted += ", or 'prompt', 'completion' and 'label'" if allowed == UNPAIRED else ""
    return PAIRS, f"expected the keys {wanted}; found {keys}; --field NAME=KEY names others"


def _missing(shape: str, values: Mapping[str, Any]) -> str | None:
    """Return the problem of a record that lacks keys of its shape."""
    missing = [key for key in _REQUIRED[shape] if key not in values]
    if not missing:
        return None
    # Lists may be whole conversations, which begin with the prompt.
    has_list = any(isinstance(values.get(key), (list, tuple)) for key in (CHOSEN, REJECTED))
    if PROMPT not in values and (shape == UNPAIRED or not has_list):
        missing.insert(0, PROMPT)
    verb = "are" if len(missing) > 1 else "is"
    keys = ", ".join(sorted(map(repr, values)))[:120] or "none"
    *others, last = map(repr, missing)
    names = f"{', '.join(others)} and {last}" if others else last
    return f"{names} {verb} missing; the keys are {keys}"


def _convert_pair(values: Mapping[str, Any], found: Converted) -> set[str]:
    """Convert a pair of answers. Return the keys that are used."""
    chosen, rejected = (_answer(values, key, found) for key in (CHOSEN, REJECTED))
    used = {CHOSEN, REJECTED, SYSTEM}
    if found.problems:
        # Whether an answer without messages is a whole conversation, which needs no prompt, is not known.
        if not _is_whole(chosen) and not _is_whole(rejected) and (PROMPT in values or (chosen and rejected)):
            _prompt(values, found)
        return used | {PROMPT}
    if _is_whole(chosen) and _is_whole(rejected):
        prompt, chosen, rejected = _split(chosen, rejected)
        if _agrees(values.get(PROMPT), prompt):
            used.add(PROMPT)
    elif _is_whole(chosen) or _is_whole(rejected):
        found.problems.append("one of 'chosen' and 'rejected' begins with the prompt; expected both or none")
        return used | {PROMPT}
    else:
        prompt = _prompt(values, found)
        used.add(PROMPT)
    prompt = _with_system(values, prompt, found)
    if found.problems:
        return used
    whole = [_finished([*prompt, *answer], key, found) for key, answer in ((CHOSEN, chosen), (REJECTED, rejected))]
    if not found.problems and _content(chosen) == _content(rejected):
        found.problems.append("'chosen' and 'rejected' are the same answer")
    found.messages, found.rejected = whole
    return used


def _convert_single(values: Mapping[str, Any], found: Converted) -> set[str]:
    """Convert an answer with a label. Return the keys that are used."""
    answer = _answer(values, COMPLETION, found)
    prompt = _prompt(values, found)
    label = values[LABEL]
    text = str(label).strip().lower() if isinstance(label, (bool, int, str)) else ""
    if text in _LABELS:
        found.label = _LABELS[text]
    else:
        found.problems.append(f"'label': expected true or false; found {label if text else json_type(label)!s:.40}")
    if not found.problems:
        found.messages = _finished([*_with_system(values, prompt, found), *answer], COMPLETION, found)
    return {PROMPT, COMPLETION, LABEL, SYSTEM}


def _answer(values: Mapping[str, Any], key: str, found: Converted) -> list[Message]:
    """Return the messages of an answer, or of a conversation that ends with it, and add problems."""
    if isinstance(values[key], (list, tuple)):
        return _read(values[key], key, found, learned=True)
    return [Message(ASSISTANT, text_of(values, key, found))]


def _prompt(values: Mapping[str, Any], found: Converted) -> list[Message]:
    """Return the messages of the prompt, and add a problem if there is none."""
    if PROMPT not in values and CHOSEN in values:
        found.problems.append(
            "'prompt' is missing: 'chosen' and 'rejected' do not show where the answer begins; expected a prompt, or "
            f"lists of messages that begin with the user's{_field_of_prompt(values)}"
        )
        return []
    if isinstance(values.get(PROMPT), (list, tuple)):
        return _read(values[PROMPT], PROMPT, found, learned=False)
    return [Message(USER, text_of(values, PROMPT, found), learned=False)]


def _field_of_prompt(values: Mapping[str, Any]) -> str:
    """Return the --field that takes another key as the prompt, if there is one that may be meant."""
    key = next((key for key in _PROMPT_WORDS if isinstance(values.get(key), str)), None)
    return f"; --field prompt={key} would take {key!r}" if key else ""


def _read(entries: object, key: str, found: Converted, *, learned: bool) -> list[Message]:
    turns = read_turns(entries, key, learned=learned)
    found.problems += [f"{key!r}: {each}" if key not in each else each for each in turns.problems]
    found.unused |= turns.unused
    if not turns.messages and not turns.problems:
        found.problems.append(f"{key!r} is empty")
    return turns.messages


def _is_whole(messages: Sequence[Message]) -> bool:
    """Return True if a list of messages begins with the prompt, and is not the answer alone."""
    return bool(messages) and messages[0].role in (USER, SYSTEM)


def _split(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the prompt that two conversations share, and the rest of each."""
    same = 0
    while same < min(len(chosen), len(rejected)) and _content([chosen[same]]) == _content([rejected[same]]):
        same += 1
    prompt = [replace(message, learned=False) for message in chosen[:same]]
    if same in (len(chosen), len(rejected)):
        # One conversation is the beginning of the other, or both are the same: the last answer is compared.
        while prompt and prompt[-1].role == ASSISTANT:
            prompt.pop()
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _agrees(text: object, prompt: Sequence[Message]) -> bool:
    """Return True if a text or a list under `prompt` says the same as the prompt of the conversations."""
    if isinstance(text, str):
        return any(message.role == USER and message.content.strip() == text.strip() for message in prompt)
    if not isinstance(text, (list, tuple)):
        return False
    return _content(read_turns(text, PROMPT, learned=False).messages) == _content(prompt)


def _with_system(values: Mapping[str, Any], prompt: list[Message], found: Converted) -> list[Message]:
    """Return the prompt after the text under `system`, if there is one."""
    if SYSTEM not in values:
        return prompt
    if prompt and prompt[0].role == SYSTEM:
        found.unused.add(SYSTEM)
        return prompt
    system = text_of(values, SYSTEM, found, may_be_empty=True)
    return [Message(SYSTEM, system, learned=False), *prompt] if system.strip() else prompt


def _finished(messages: list[Message], key: str, found: Converted) -> tuple[Message, ...]:
    """Return a conversation that ends with an answer, and add what is wrong about the order of its messages."""
    turns = finish_turns(Turns(list(messages)), key)
    found.problems += turns.problems
    found.num_trimmed = max(found.num_trimmed, turns.num_trimmed)
    found.num_adjacent = max(found.num_adjacent, turns.num_adjacent)
    return tuple(turns.messages)


def _content(messages: Sequence[Message]) -> list[tuple[Any, ...]]:
    return [(each.role, each.content.strip(), each.tool_calls, each.tool_call_id, each.name) for each in messages]

"""Instruction/response pairs and conversations from JSONL, checked before any work.

A line is a pair, or a conversation as chat models have it: `messages`, each with `role` and `content`, of the user and
the assistant in turn. What a system message says comes before the user's first words, as Mixtral-Instruct's template
has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.fields import flag_of
from mixtral_run.errors import ConfigError

NUM_PROBLEMS_SHOWN = 10
KEYS = ("instruction", "response")
MESSAGES = "messages"
ROLES = ("system", "user", "assistant")
EXAMPLE_LINES = (
    '{"instruction": "What is 7 times 8?", "response": "56"}',
    '{"messages": [{"role": "user", "content": "What is 7 times 8?"}, {"role": "assistant", "content": "56"}]}',
)


@dataclass(frozen=True)
class Example:
    """One example to learn from. `line` is its line in the file, from 1; texts are stripped. earlier: what was asked
    and answered before in the same conversation, to be learned as well."""

    instruction: str
    response: str
    line: int
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Instruction and response of each turn."""
        return (*self.earlier, (self.instruction, self.response))


def read_examples(path: Path, setting: str = "data_path") -> list[Example]:
    """All pairs of a JSONL file, in its order; further keys are ignored.

    setting: the config's that names the file, for errors.

    Blank lines are skipped. Raises ConfigError naming every line that is not a pair (the first ten, then their
    number), or that the file is missing, not UTF-8 or without any pair.
    """
    where, what = where_of(setting, path), "validation" if setting == "valid_data_path" else "training"
    expected = f"a JSON object a line: {' or '.join(EXAMPLE_LINES)}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The {what} data cannot be read.", where=where, found=error.strerror) from error
    try:
        # Some editors put a byte order mark first.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        broken = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"The {what} data are not UTF-8.",
            where=where,
            found=f"line {broken}: byte 0x{content[error.start]:02x}",
            next_command=f"iconv -f latin1 -t utf-8 {path}, if that is how it was saved",
        ) from error
    pairs: list[Example] = []
    problems: list[str] = []
    # Not splitlines(): that also splits at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = list(_line_problems(line))
        problems += [f"line {number}: {problem}" for problem in found]
        if not found:
            *earlier, last = _turns(json.loads(line))
            pairs.append(Example(*last, number, tuple(earlier)))
    if problems:
        raise ConfigError(
            f"The {what} data cannot be used as they are.",
            where=where,
            problems=first_problems(problems),
            expected=expected,
        )
    if not pairs:
        raise ConfigError(f"The {what} data hold no pair.", where=where, expected=expected, found="an empty file")
    return pairs


def where_of(setting: str, path: Path) -> str:
    """`--data-path FILE`, as errors have it."""
    return f"{flag_of(setting)} {path}"


def first_problems(problems: list[str]) -> list[str]:
    """The first ten faults and, where there are more, how many."""
    shown = problems[:NUM_PROBLEMS_SHOWN]
    more = len(problems) - len(shown)
    return [*shown, f"and {more:,} more"] if more else shown


def _line_problems(line: str) -> Iterator[str]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        yield f"broken JSON: {error.msg} at column {error.colno}"
        return
    except RecursionError:
        yield "broken JSON: nested too deeply"
        return
    if not isinstance(values, dict):
        yield f"expected a JSON object; found {_json_type(values)}"
        return
    if _is_conversation(values):
        yield from _conversation_problems(values[MESSAGES])
        return
    for key in KEYS:
        if key not in values:
            present = ", ".join(sorted(map(repr, values))) or "none"
            yield f"'{key}' is missing; the keys are {present[:80]}"
        else:
            yield from _text_problems(f"'{key}'", values[key])


def _is_conversation(values: dict[str, Any]) -> bool:
    """What is said as a pair is taken as one; the rest of its keys are ignored."""
    return MESSAGES in values and not any(key in values for key in KEYS)


def _conversation_problems(messages: object) -> Iterator[str]:
    if not isinstance(messages, list):
        yield f"'messages': expected a list; found {_json_type(messages)}"
        return
    roles = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            yield f"message {number}: expected a JSON object; found {_json_type(message)}"
            return
        roles.append(message.get("role"))
        if roles[-1] not in ROLES:
            yield f"message {number}: 'role': expected {', '.join(ROLES)}; found {json.dumps(roles[-1])[:40]}"
        yield from _text_problems(f"message {number}: 'content'", message.get("content"))
    asked = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = ["user", "assistant"] * max(1, len(asked) // 2)
    if all(role in ROLES for role in roles) and asked != in_turn:
        found = ", ".join(map(str, roles)) or "none"
        yield f"'messages': expected the user and the assistant in turn, the assistant last; found {found[:80]}"


def _text_problems(name: str, text: object) -> Iterator[str]:
    if not isinstance(text, str):
        yield f"{name}: expected text; found {_json_type(text)}"
    elif not text.strip():
        yield f"{name} is empty"


def _turns(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Instruction and response of each turn of a line without faults."""
    if not _is_conversation(values):
        return [(values["instruction"].strip(), values["response"].strip())]
    texts = [message["content"].strip() for message in values[MESSAGES]]
    if values[MESSAGES][0]["role"] == "system":
        system, first, *rest = texts
        texts = [f"{system}\n\n{first}", *rest]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


DATA_SETTINGS = ("data_path", "valid_data_path")
"""Settings that name files of pairs."""

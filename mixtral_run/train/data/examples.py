"""Reading of training and validation examples from JSONL. Every line is checked before any work.

A line is an instruction with its response, or a conversation in the format of chat models: `messages`, each with `role`
and `content`, of the user and the assistant in turn. A system message is put before the user's first message, as in the
chat template of Mixtral-Instruct.
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
    """One training example. Texts are stripped.

    Attributes:
        instruction: the user's message, or the last one of a conversation.
        response: the assistant's answer to it.
        line: the example's line in the file, from 1.
        earlier: instruction and response of the earlier turns of the conversation, which are trained on as well.
    """

    instruction: str
    response: str
    line: int
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Instruction and response of each turn."""
        return (*self.earlier, (self.instruction, self.response))


def read_examples(path: Path, setting: str = "data_path") -> list[Example]:
    """Return all examples of a JSONL file in its order. Blank lines are skipped, further keys ignored.

    Args:
        path: the file.
        setting: the setting that names the file, for errors.

    Raises:
        ConfigError: the file is missing, not UTF-8 or empty, or lines are not examples; the first ten are listed.
    """
    where, what = where_of(setting, path), "validation" if setting == "valid_data_path" else "training"
    expected = f"a JSON object a line: {' or '.join(EXAMPLE_LINES)}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The {what} data cannot be read.", where=where, found=error.strerror) from error
    try:
        # Some editors write a byte order mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        broken = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"The {what} data are not UTF-8.",
            where=where,
            found=f"line {broken}: byte 0x{content[error.start]:02x}",
            next_command=f"iconv -f latin1 -t utf-8 {path}, if that is how it was saved",
        ) from error
    examples: list[Example] = []
    problems: list[str] = []
    # Not splitlines(): that also splits at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = list(_line_problems(line))
        problems += [f"line {number}: {problem}" for problem in found]
        if not found:
            *earlier, last = _turns(json.loads(line))
            examples.append(Example(*last, number, tuple(earlier)))
    if problems:
        raise ConfigError(
            f"The {what} data cannot be used as they are.",
            where=where,
            problems=first_problems(problems),
            expected=expected,
        )
    if not examples:
        raise ConfigError(f"The {what} data hold no example.", where=where, expected=expected, found="an empty file")
    return examples


def where_of(setting: str, path: Path) -> str:
    """Return `--data-path FILE`, the place that errors name."""
    return f"{flag_of(setting)} {path}"


def first_problems(problems: list[str]) -> list[str]:
    """Return the first ten problems and, if there are more, their number."""
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
    """Return True if the line is a conversation. The keys of an instruction with its response take precedence."""
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
    """Return instruction and response of each turn of a valid line."""
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
"""Settings that name files of examples."""

"""Reading of training and validation examples from JSONL. Every line is checked before any work.

A line is an instruction with its response, or a conversation in the format of chat models: `messages`, each with `role`
and `content`, of the user and the assistant in turn. A system message is put before the user's first message, as in the
chat template of Mixtral-Instruct; an empty one counts as none. `weight` (0 or 1) or `train` of an answer decides
whether it is learned. All other keys are unused, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.fields import flag_of
from mixtral_run.errors import ConfigError

NUM_PROBLEMS_SHOWN = 10
KEYS = ("instruction", "response")
MESSAGES = "messages"
ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "weight", "train")
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
        learned: for each turn, True if its response counts in the loss. Empty: all count.
    """

    instruction: str
    response: str
    line: int
    earlier: tuple[tuple[str, str], ...] = ()
    learned: tuple[bool, ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Instruction and response of each turn."""
        return (*self.earlier, (self.instruction, self.response))


@dataclass(frozen=True)
class ExampleFile:
    """The examples of a file in its order, and the keys that are not used with the number of lines that have them."""

    examples: list[Example]
    unused_keys: Mapping[str, int]

    def describe_unused(self) -> str | None:
        """Return one line about the unused keys; None if there are none."""
        if not self.unused_keys:
            return None
        keys = ", ".join(f"{key!r} ({count:,})" for key, count in list(self.unused_keys.items())[:NUM_PROBLEMS_SHOWN])
        more = f" and {len(self.unused_keys) - NUM_PROBLEMS_SHOWN} more" * (len(self.unused_keys) > NUM_PROBLEMS_SHOWN)
        return f"Keys that are not used, with the number of lines: {keys}{more}. Their texts are not learned."


def read_examples(path: Path, setting: str = "data_path") -> list[Example]:
    """Return the examples of `read_example_file`."""
    return read_example_file(path, setting).examples


def read_example_file(path: Path, setting: str = "data_path") -> ExampleFile:
    """Return all examples of a JSONL file. Blank lines are skipped.

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
    _refuse_other_formats(content, path, where)
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
    unused: Counter[str] = Counter()
    # Not splitlines(): that also splits at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = list(_line_problems(line))
        problems += [f"line {number}: {problem}" for problem in found]
        if not found:
            values = json.loads(line)
            unused.update(_unused_keys(values))
            *earlier, last = _turns(values)
            examples.append(Example(*last, number, tuple(earlier), _learned(values)))
    if problems:
        raise ConfigError(
            f"The {what} data cannot be used as they are.",
            where=where,
            problems=first_problems(problems),
            expected=expected,
        )
    if not examples:
        raise ConfigError(f"The {what} data hold no example.", where=where, expected=expected, found="an empty file")
    return ExampleFile(examples, unused)


def _refuse_other_formats(content: bytes, path: Path, where: str) -> None:
    """Raise ConfigError for a file of another format, with the command that makes JSONL of it."""
    for beginning, name, command in _OTHER_FORMATS:
        if content.startswith(beginning):
            raise ConfigError(
                f"The data are {name}, not JSONL.",
                where=where,
                expected="one JSON object per line, in UTF-8",
                next_command=command.format(path=path, stem=path.with_suffix("")),
            )
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and content.rstrip().endswith(b"]"):
        try:
            entries = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(
                f"The data are one JSON list of {len(entries):,} objects, not JSONL.",
                where=where,
                expected="one JSON object per line",
                next_command=f"jq -c '.[]' {path} > {path.with_suffix('.jsonl')}",
            )


_OTHER_FORMATS = (
    (b"\x1f\x8b", "compressed with gzip", "gzip -dk {path}, then the unpacked file"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "zstd -dk {path}, then the unpacked file"),
    (b"PAR1", "a Parquet file", "python -c \"import pandas; pandas.read_parquet('{path}').to_json('{stem}.jsonl', "
     "orient='records', lines=True)\""),
    (b"ARROW1", "an Arrow file", "python -c \"import pandas; pandas.read_feather('{path}').to_json('{stem}.jsonl', "
     "orient='records', lines=True)\""),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > {stem}-utf8.jsonl"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > {stem}-utf8.jsonl"),
)  # fmt: skip


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
        if number == 1 and _is_empty_system(message):
            continue
        roles.append(message.get("role"))
        if roles[-1] not in ROLES:
            yield f"message {number}: 'role': expected {', '.join(ROLES)}; found {json.dumps(roles[-1])[:40]}"
        yield from _text_problems(f"message {number}: 'content'", message.get("content"))
        yield from _weight_problems(number, message)
    asked = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = ["user", "assistant"] * max(1, len(asked) // 2)
    if all(role in ROLES for role in roles) and asked != in_turn:
        found = ", ".join(map(str, roles)) or "none"
        yield f"'messages': expected the user and the assistant in turn, the assistant last; found {found[:80]}"
    elif asked == in_turn and not any(_counts(each) for each in messages if each.get("role") == "assistant"):
        yield "'messages': expected an answer that is learned; found 'weight' 0 or 'train' false on every one"


def _is_empty_system(message: Mapping[str, Any]) -> bool:
    """Return True for a system message without a text, as exports of chats contain it."""
    content = message.get("content")
    return message.get("role") == "system" and (content is None or (isinstance(content, str) and not content.strip()))


def _weight_problems(number: int, message: Mapping[str, Any]) -> Iterator[str]:
    if message.get("weight", 1) not in (0, 1):
        yield f"message {number}: 'weight': expected 0 or 1; found {json.dumps(message['weight'])[:40]}"
    if not isinstance(message.get("train", True), bool):
        yield f"message {number}: 'train': expected true or false; found {json.dumps(message['train'])[:40]}"


def _counts(message: Mapping[str, Any]) -> bool:
    return bool(message.get("weight", 1)) and bool(message.get("train", True))


def _text_problems(name: str, text: object) -> Iterator[str]:
    if not isinstance(text, str):
        yield f"{name}: expected text; found {_json_type(text)}"
    elif not text.strip():
        yield f"{name} is empty"
    else:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            yield f"{name}: half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start + 1}"


def _turns(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return instruction and response of each turn of a valid line."""
    if not _is_conversation(values):
        return [(values["instruction"].strip(), values["response"].strip())]
    messages = _messages(values)
    texts = [message["content"].strip() for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = texts
        texts = [f"{system}\n\n{first}", *rest]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _messages(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = values[MESSAGES]
    return messages[1:] if _is_empty_system(messages[0]) else messages


def _learned(values: dict[str, Any]) -> tuple[bool, ...]:
    """Return for each turn of a valid line whether its response is learned; nothing if all are."""
    if not _is_conversation(values):
        return ()
    counts = tuple(_counts(message) for message in _messages(values) if message["role"] == "assistant")
    return () if all(counts) else counts


def _unused_keys(values: dict[str, Any]) -> set[str]:
    if not _is_conversation(values):
        return set(values) - set(KEYS)
    within = {f"messages: {key}" for message in values[MESSAGES] for key in set(message) - set(MESSAGE_KEYS)}
    return set(values) - {MESSAGES} | within


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


DATA_SETTINGS = ("data_path", "valid_data_path")
"""Settings that name files of examples."""

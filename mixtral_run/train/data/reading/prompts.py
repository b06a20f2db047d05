"""Prompts in the shapes of training examples. An answer may be missing; the last one is left out, to be generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.data import AUTO
from mixtral_run.config.data_sources import DataSource
from mixtral_run.errors import ConfigError, shortened
from mixtral_run.train.data.reading.conversations import ROLE_NAMES
from mixtral_run.train.data.reading.data_files import files_of
from mixtral_run.train.data.reading.example import ASSISTANT, Message
from mixtral_run.train.data.reading.records import BadRecord
from mixtral_run.train.data.reading.shapes import convert

_TASKS = {"instruction": ("response", "output"), "prompt": ("completion",), "question": ("answer",)}
"""Key of a task, and the keys under which its response may be."""
_LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_STAND_IN = "…"
"""Answer of a prompt that has none, so that the prompt is read and checked as a whole example."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt. messages: a conversation that the assistant continues. text: a plain text to continue, else None."""

    place: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def shown(self) -> str:
        """Return the text, or the last message of the conversation."""
        return self.text if self.text is not None else self.messages[-1].content


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file, and lines about what was not used."""

    prompts: tuple[Prompt, ...]
    remarks: tuple[str, ...] = ()


def read_prompts(file: Path, flag: str = "--prompts") -> PromptFile:
    """Read the prompts of a file of any format that training takes. Raises ConfigError with all problems."""
    where = f"{flag} {file}"
    problems: list[str] = []
    prompts: list[Prompt] = []
    unused: Counter[str] = Counter()
    adjacent: list[str] = []
    if not file.is_file():
        raise ConfigError("The prompts cannot be read.", where=where, expected="a file", found="nothing of that name"
                          if not file.exists() else "no file")  # fmt: skip
    found = files_of(DataSource(str(file), str(file)), where)
    for data in found.files:
        for record in data.records(where):
            if isinstance(record, BadRecord):
                problems.append(f"{record.place}: {record.problem}")
                continue
            try:
                converted = convert(_with_answer(record.values), AUTO)
            except RecursionError:
                problems.append(f"{record.place}: nested too deeply")
                continue
            problems += [f"{record.place}: {each}" for each in converted.problems]
            if not converted.problems:
                unused.update(converted.unused)
                adjacent += [record.place] if converted.num_adjacent else []
                messages = converted.messages[:-1]
                prompts.append(Prompt(record.place, messages, converted.text, converted.tools))
    if problems or not prompts:
        raise ConfigError(
            "Some prompts cannot be used." if problems else "There is no prompt.",
            where=where,
            problems=shortened(problems),
            expected='a JSON object a line: {"instruction": "…"}, {"messages": [{"role": "user", "content": "…"}]} or '
            '{"text": "…"}',
            found=None if problems else "an empty file",
        )
    remarks = [f"{where}: the key {key!r} of {count:,} prompts is not used" for key, count in sorted(unused.items())]
    if adjacent:
        remarks.append(f"{where}: adjacent messages of one role, which the chat template may join: {adjacent[0]}"
                       + (f" and {len(adjacent) - 1:,} more" if adjacent[1:] else ""))  # fmt: skip
    return PromptFile(tuple(prompts), (*remarks, *([f"{where} {found.left_out}"] if found.left_out else ())))


def _with_answer(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as a whole example: a prompt without an answer gets a stand-in."""
    values = {key: value for key, value in record.items() if value is not None}
    for key, names in _LISTS.items():
        turns = values.get(key)
        if isinstance(turns, (list, tuple)):
            if turns and not _is_answer(turns[-1]):
                values[key] = [*turns, dict(zip(names, ("assistant", _STAND_IN), strict=True))]
            return values
    for key, answers in _TASKS.items():
        if key in values and not any(name in values for name in answers):
            as_list = isinstance(values[key], (list, tuple))
            values[answers[0]] = [{"role": "assistant", "content": _STAND_IN}] if as_list else _STAND_IN
            return values
    return values


def _is_answer(turn: object) -> bool:
    """Return True for a message of the assistant, and for one that is wrong, which is reported as it stands."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return not isinstance(role, str) or ROLE_NAMES.get(role.lower(), ASSISTANT) == ASSISTANT

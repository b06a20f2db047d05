"""Instruction/response pairs from JSONL, checked before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import ConfigError
from mixtral_run.settings import flag_of

NUM_FAULTS_SHOWN = 10
KEYS = ("instruction", "response")
EXAMPLE = '{"instruction": "What is 7 times 8?", "response": "56"}'


@dataclass(frozen=True)
class Pair:
    """One example to learn from. `line` is its line in the file, from 1; both texts are stripped."""

    instruction: str
    response: str
    line: int


def read_pairs(path: Path, setting: str = "data_path") -> list[Pair]:
    """All pairs of a JSONL file, in its order; keys other than `instruction` and `response` are ignored.

    setting: the config's that names the file, for errors.

    Blank lines are skipped. Raises ConfigError naming every line that is not a pair (the first ten, then their
    number), or that the file is missing, not UTF-8 or without any pair.
    """
    where, what = where_of(setting, path), "validation" if setting == "valid_data_path" else "training"
    expected = f"a JSON object a line: {EXAMPLE}"
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
    pairs: list[Pair] = []
    faults: list[str] = []
    # Not splitlines(): that also splits at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = list(_line_faults(line))
        faults += [f"line {number}: {fault}" for fault in found]
        if not found:
            values = json.loads(line)
            pairs.append(Pair(values["instruction"].strip(), values["response"].strip(), number))
    if faults:
        raise ConfigError(
            f"The {what} data cannot be used as they are.",
            where=where,
            faults=first_faults(faults),
            expected=expected,
        )
    if not pairs:
        raise ConfigError(f"The {what} data hold no pair.", where=where, expected=expected, found="an empty file")
    return pairs


def where_of(setting: str, path: Path) -> str:
    """`--data-path FILE`, as errors have it."""
    return f"{flag_of(setting)} {path}"


def first_faults(faults: list[str]) -> list[str]:
    """The first ten faults and, where there are more, how many."""
    shown = faults[:NUM_FAULTS_SHOWN]
    more = len(faults) - len(shown)
    return [*shown, f"and {more:,} more"] if more else shown


def _line_faults(line: str) -> Iterator[str]:
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
    for key in KEYS:
        if key not in values:
            present = ", ".join(sorted(map(repr, values))) or "none"
            yield f"'{key}' is missing; the keys are {present[:80]}"
        elif not isinstance(values[key], str):
            yield f"'{key}': expected text; found {_json_type(values[key])}"
        elif not values[key].strip():
            yield f"'{key}' is empty"


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

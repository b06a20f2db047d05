"""Records: what the readers of all formats yield, before the shape of an example is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.json_values import LongNumber, number_name

LONGEST_RECORD = 64 << 20
"""Characters of the longest record that is read. A longer one is a file of another form, and would fill the memory."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file.

    Attributes:
        place: where it stands in its file: "line 12", "row 12", "entry 3 (line 7)".
        values: its keys and values. A value of None counts as an absent key: tables have a value in every column.
        line: the line as it stands in a JSONL file, from which errors name a column; else None.
    """

    place: str
    values: Mapping[str, Any]
    line: str | None = None


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be read, with the reason. The records after it can."""

    place: str
    problem: str


def refuse_same_names(names: Sequence[str], where: str) -> None:
    """Raise ConfigError if a table has two columns of one name, of which one would be lost."""
    twice = sorted({name for name, count in Counter(names).items() if count > 1})
    if twice:
        raise ConfigError(
            "The table has columns of the same name.", where=where, found=", ".join(map(repr, twice))[:200]
        )


def json_type(value: object) -> str:
    """Return the name of a value's JSON type, for errors."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, LongNumber):
        return str(value)
    return names.get(
        type(value), number_name(value) if isinstance(value, (int, float)) else f"a {type(value).__name__}"
    )


def as_record(place: str, value: object, line: str | None = None) -> Record | BadRecord:
    """Return the record of a JSON value, which must be an object."""
    if isinstance(value, dict):
        return Record(place, value, line)
    return BadRecord(place, f"expected a JSON object; found {json_type(value)}")

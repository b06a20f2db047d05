"""JSON as other programs write it: values that Python's reader refuses or reads in silence. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MOST_DIGITS = 4000
"""Digits of the longest whole number that becomes an int; Python refuses 4,300, whose conversion takes long."""

MOST_LEVELS = 200
"""Objects and lists within each other that are read. Python's own limit depends on what has called the reader."""
TOO_DEEP = f"objects or lists are nested too deeply to be read, more than {MOST_LEVELS} levels"


class LongNumber:
    """A whole number of thousands of digits, which is of no use but under a key that is not used."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return f"a number of {len(self.text.lstrip('-')):,} digits"


class JsonReader:
    """A decoder that notes a key that an object has twice, and takes numbers of any length.

    Attributes:
        twice: the first key that was there twice in the last value; None if there was none.
        is_deep: the last value is nested too deeply.
    """

    def __init__(self) -> None:
        self.twice: str | None = None
        self.is_deep = False
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=_whole_number)

    def decode(self, text: str) -> Any:
        """Return the value of a text. Raises JSONDecodeError or RecursionError."""
        self.twice = None
        value = self._decoder.decode(text)
        self.is_deep = is_too_deep(value, text)
        return value

    def raw_decode(self, text: str, begin: int) -> tuple[Any, int]:
        """Return the value at a place of a text, and its end. Raises JSONDecodeError or RecursionError."""
        self.twice = None
        value, end = self._decoder.raw_decode(text, begin)
        self.is_deep = is_too_deep(value, text, begin, end)
        return value, end

    @property
    def problem(self) -> str | None:
        """Return why the last value cannot be used, or None: a part of it is lost, or it is nested too deeply."""
        if self.is_deep:
            return TOO_DEEP
        if self.twice is None:
            return None
        return f"the key {self.twice[:80]!r} is there twice; one of its values would be lost"

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and self.twice is None:
            keys = [key for key, _ in pairs]
            self.twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        return found


def read_json(text: str) -> Any:
    """Return the value of a JSON text within a record. Raises ValueError if it is none, or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if is_too_deep(value, text):
        raise ValueError(TOO_DEEP)
    return value


def is_too_deep(value: object, text: str, begin: int = 0, end: int | None = None) -> bool:
    """Return True if a value, which was read from a part of a text, has more than MOST_LEVELS levels."""
    if text.count("{", begin, end) + text.count("[", begin, end) <= MOST_LEVELS:
        return False
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [each for each in level if isinstance(each, (dict, list))]
        if not level:
            return False
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return True


def _whole_number(text: str) -> int | LongNumber:
    return int(text) if len(text) <= MOST_DIGITS else LongNumber(text)


def problem_of(error: json.JSONDecodeError, column: int) -> str:
    """Return what is wrong with a text that is no JSON, with its column."""
    message, help_ = error.msg.removesuffix(" at"), ""
    if "\0" in error.doc[error.pos : error.pos + 2]:
        message, help_ = "NUL byte", ", as a file has that was not written to its end"
    elif error.msg == "Extra data":
        message = f"{'a comma' if error.doc[error.pos] == ',' else 'more text'} after the end of the value"
        if "\r" in error.doc[: error.pos]:
            help_ = "; lines end with a carriage return alone: tr '\\r' '\\n' < FILE > NEW-FILE"
    return f"{message} at column {column}{help_}"


def unwritable_number(value: object) -> str | None:
    """Return a number within a value that JSON does not have, or that is too long; None if there is none."""
    if isinstance(value, LongNumber):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return number_name(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for each in inner if (found := unwritable_number(each)) is not None), None)


def number_name(value: float) -> str:
    """Return how errors name a number."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN, a missing value; null counts as an absent key"
    return "a number beyond the range of floats" if isinstance(value, float) and math.isinf(value) else "a number"

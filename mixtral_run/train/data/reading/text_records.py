"""Readers of JSONL, JSON and CSV. They stream: memory is bounded by the longest record. Standard library only."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.json_values import TOO_DEEP, JsonReader, problem_of
from mixtral_run.train.data.reading.records import (
    LONGEST_RECORD,
    BadRecord,
    Record,
    as_record,
    refuse_same_names,
)

_BLOCK = 1 << 20
_NEAR_THE_END = 32
"""Characters before the end of the text read so far within which an error may only mean that more must be read."""
_BLANK = " \t\r\n"


def jsonl_records(stream: IO[bytes], encoding: str, where: str) -> Iterator[Record | BadRecord]:
    """Yield the records of one JSON object a line. Blank lines are skipped."""
    lines: Iterable[Any] = _binary_lines(stream)
    if not encoding.startswith("utf-8"):
        lines = text_lines(stream, encoding, where)
    reader = JsonReader()
    # Not splitlines(): that also splits at separators that JSON allows inside a string.
    for number, raw in enumerate(lines, start=1):
        place = f"line {number}"
        if len(raw) > LONGEST_RECORD:
            raise too_long(where, place)
        if not raw.strip():
            continue
        if isinstance(raw, bytes):
            try:
                # Some editors write a byte order mark; files that were joined have it in the middle.
                line = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                found = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
                yield BadRecord(place, f"not UTF-8: {found}")
                continue
            if not line.strip():
                continue
        else:
            line = raw
        yield _parsed(place, line, reader)


def _parsed(place: str, line: str, reader: JsonReader) -> Record | BadRecord:
    try:
        value = reader.decode(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return BadRecord(place, f"broken JSON: {problem_of(error, error.colno)}")
    except RecursionError:
        return BadRecord(place, TOO_DEEP)
    return BadRecord(place, reader.problem) if reader.problem else as_record(place, value, line)


def json_records(stream: IO[bytes], encoding: str, where: str) -> Iterator[Record | BadRecord]:
    """Yield the objects of a JSON list, or of JSON values one after the other, each over any number of lines.

    Raises ConfigError at the first place that is not JSON: what follows cannot be told apart.
    """
    text = _Text(_text_blocks(stream, encoding, where), where)
    number, in_list = 0, False
    while True:
        mark = text.skip_blank()
        if mark == "":
            if in_list:
                raise _broken(where, text.line, "the list does not end; its ']' is missing")
            return
        if mark == "[" and not in_list:
            in_list, number = True, 0
            text.skip(1)
            continue
        if mark == "]" and in_list:
            in_list = False
            text.skip(1)
            continue
        number += 1
        place = f"entry {number} (line {text.line})"
        value = text.value()
        yield BadRecord(place, text.reader.problem) if text.reader.problem else as_record(place, value)
        if not in_list:
            continue
        mark = text.skip_blank()
        if mark == ",":
            text.skip(1)
        elif mark not in ("]", ""):
            raise _broken(where, text.line, f"expected ',' or ']' after entry {number}")


class _Text:
    """Text of which blocks are read as they are needed, with a position in it."""

    def __init__(self, blocks: Iterator[str], where: str) -> None:
        self._blocks, self._where = blocks, where
        self._text, self._at, self._counted, self._ended = "", 0, 0, False
        self.reader = JsonReader()
        self.line = 1

    def skip(self, count: int) -> None:
        self._at += count

    def skip_blank(self) -> str:
        """Move to the next character that is not blank and return it; return nothing at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                self._count_lines(self._at)
                return self._text[self._at]
            if not self._read_more():
                self._count_lines(self._at)
                return ""

    def value(self) -> Any:
        """Return the JSON value at the position, and move behind it."""
        while True:
            try:
                value, end = self.reader.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                at_the_end = error.pos >= len(self._text) - _NEAR_THE_END or error.msg.startswith("Unterminated")
                if not at_the_end or not self._read_more():
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    column = error.pos - self._text.rfind("\n", 0, error.pos)
                    raise _broken(self._where, line, problem_of(error, column)) from error
            except RecursionError as error:
                raise ConfigError(
                    "The JSON cannot be read further.", where=self._where, found=f"line {self.line}: {TOO_DEEP}"
                ) from error
            else:
                # A number at the end of what was read may have more digits.
                if end < len(self._text) or not self._read_more():
                    self._at = end
                    return value

    def _count_lines(self, end: int) -> None:
        self.line += self._text.count("\n", self._counted, end)
        self._counted = end

    def _read_more(self) -> bool:
        """Append as much as the rest of the text has, at least a block. Return False at the end of the file."""
        if self._ended:
            return False
        self._count_lines(max(self._at, self._counted))
        rest = self._text[self._at :]
        if len(rest) > LONGEST_RECORD:
            raise too_long(self._where, f"line {self.line}")
        parts, missing = [rest], max(_BLOCK, len(rest))
        while missing > 0 and (block := next(self._blocks, "")):
            parts.append(block)
            missing -= len(block)
        self._ended = missing > 0
        self._text, self._at, self._counted = "".join(parts), 0, 0
        return len(self._text) > len(rest)


def csv_records(stream: IO[bytes], encoding: str, delimiter: str, where: str) -> Iterator[Record | BadRecord]:
    """Yield the rows of a table whose first line names the columns. An empty field counts as an absent key."""
    csv.field_size_limit(LONGEST_RECORD)
    rows = csv.reader(text_lines(stream, encoding, where), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            # The reader's own words advise a mode of Python's open().
            returns = str(error).startswith("new-line character")
            raise ConfigError(
                "The table cannot be read.",
                where=where,
                found=f"line {line}: {'a carriage return without a line feed' if returns else error}",
                expected='columns separated by one character; a field with it, a quote or a line break in "quotes"',
                next_command="tr '\\r' '\\n' < FILE > NEW-FILE, if lines end with a carriage return alone"
                if returns
                else None,
            ) from error
        if row is None:
            return
        if not any(field.strip() for field in row):
            continue
        if header is None:
            header = [name.strip() for name in row]
            refuse_same_names(header, where)
        elif len(row) != len(header):
            yield BadRecord(f"line {line}", f"expected {len(header)} fields, as the header has; found {len(row)}")
        else:
            yield Record(f"line {line}", {name: field or None for name, field in zip(header, row, strict=True)})


def text_lines(stream: IO[bytes], encoding: str, where: str) -> Iterator[str]:
    """Yield lines with their ends. A last line without an end is one as well."""
    rest: list[str] = []
    size = 0
    for block in _text_blocks(stream, encoding, where):
        first, *others = block.split("\n")
        rest.append(first)
        size += len(first)
        if size > LONGEST_RECORD:
            raise too_long(where, "a line")
        if others:
            yield "".join(rest) + "\n"
            yield from (line + "\n" for line in others[:-1])
            rest, size = [others[-1]], len(others[-1])
    if last := "".join(rest):
        yield last


def _binary_lines(stream: IO[bytes]) -> Iterable[bytes]:
    return iter(lambda: stream.readline(LONGEST_RECORD + 1), b"")


def _text_blocks(stream: IO[bytes], encoding: str, where: str) -> Iterator[str]:
    """Yield the decoded text in blocks. Raises ConfigError at a byte that the encoding does not have."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
    lines = 1
    while True:
        block = stream.read(_BLOCK)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = lines + error.object[: error.start].decode(encoding, errors="replace").count("\n")
            raise ConfigError(
                f"The data are not {encoding.removesuffix('-sig').upper()}.",
                where=where,
                found=f"line {line}: byte 0x{error.object[error.start]:02x}",
                next_command=(
                    "iconv -f latin1 -t utf-8 FILE, if that is how it was saved"
                    if encoding.startswith("utf-8")
                    else "copy or download the file again, and compare its size with the source's"
                ),
            ) from error
        lines += text.count("\n")
        if text:
            yield text
        if not block:
            return


def too_long(where: str, place: str) -> ConfigError:
    """Return the error for a record that would fill the memory."""
    return ConfigError(
        "The data hold a record that is too long to be an example.",
        where=where,
        found=f"{place}: more than {LONGEST_RECORD >> 20} MiB",
        expected="one example a line or an entry of a list",
        next_command="jq -c '.KEY[]' FILE > FILE.jsonl, if the examples are a list under a key of one object",
    )


def _broken(where: str, line: int, problem: str) -> ConfigError:
    return ConfigError("The JSON is broken; what follows cannot be read.", where=where, found=f"line {line}: {problem}")

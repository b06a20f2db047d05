"""Readers of text and of compressed files: every format is recognized by its content, with places and problems."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.data_sources import parse_source
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading import text_records
from mixtral_run.train.data.reading.data_files import files_of
from mixtral_run.train.data.reading.json_values import JsonReader
from mixtral_run.train.data.reading.records import BadRecord, Record, json_type
from mixtral_run.train.data.reading.shapes import convert

ROWS = [{"instruction": "Größe?\u2028\x85", "response": 'a\n,"b" 🙂'}, {"instruction": "b", "response": "\tc\r\nd"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def records(path: Path) -> list[Record | BadRecord]:
    (file,) = files_of(parse_source(str(path)), str(path)).files
    return list(file.records(str(path)))


def values(path: Path) -> list[Any]:
    found = records(path)
    assert all(isinstance(each, Record) for each in found), found
    return [each.values for each in found if isinstance(each, Record)]


def refused(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        records(path)
    assert str(path) in str(caught.value)
    return caught.value


def as_csv(delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["instruction", "response"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


TEXTS = {
    "lines": LINES,
    "lines with blanks": f"\n  \n{LINES}\r\n\n",
    "list": json.dumps(ROWS, ensure_ascii=False),
    "list over lines": json.dumps(ROWS, indent=2),
    "objects over lines": "\n".join(json.dumps(row, indent=4) for row in ROWS) + "\n",
    "csv": as_csv(),
    "tsv": as_csv("\t"),
    "semicolons": as_csv(";"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_text_is_read_whatever_its_name(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(text.encode(encoding))
    assert values(path) == ROWS


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_compressed_files_are_read_by_content(tmp_path: Path, text: str, compress: Any) -> None:
    path = tmp_path / "data.jsonl"
    # Two members, as `cat a.gz b.gz` makes them.
    content = text.encode()
    path.write_bytes(compress(content[:10]) + compress(content[10:]))
    assert values(path) == ROWS


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / "data.gz"
    lines = [json.dumps({"instruction": random.Random(n).random(), "response": "b"}) for n in range(9000)]
    path.write_bytes(compress("\n".join(lines).encode())[:-100])
    assert "cut off or damaged" in refused(path).what


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("name", ["list over lines", "objects over lines", "csv"])
def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int) -> None:
    monkeypatch.setattr(text_records, "_BLOCK", block)
    path = tmp_path / "data"
    path.write_bytes(TEXTS[name].encode("utf-8"))
    assert values(path) == ROWS


def test_a_number_at_the_end_of_a_block_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_records, "_BLOCK", 1)
    path = tmp_path / "data"
    path.write_text('[12345, {"a": 1}]')
    bad = BadRecord("entry 1 (line 1)", "expected a JSON object; found a number")
    assert records(path) == [bad, Record("entry 2 (line 1)", {"a": 1})]


def test_places_are_lines_and_entries(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for name, places in {
        "lines with blanks": ["line 3", "line 4"],
        "list over lines": ["entry 1 (line 2)", "entry 2 (line 6)"],
        "objects over lines": ["entry 1 (line 1)", "entry 2 (line 5)"],
        "csv": ["line 2", "line 4"],
    }.items():
        path.write_bytes(TEXTS[name].encode())
        assert [each.place for each in records(path)] == places, name


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"instruction": "a", "response": "b"', "broken JSON: Expecting ',' delimiter at column 37"),
        ('["a", "b"]', "expected a JSON object; found a list"),
        ("null", "expected a JSON object; found null"),
        ("[" * 200_000, "objects or lists are nested too deeply to be read"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice; one of its values would be lost"),
        ('{"a": 1},', "broken JSON: a comma after the end of the value at column 9"),
        ('{"a": 1} {"a": 1}', "broken JSON: more text after the end of the value at column 10"),
        ('{"a": "b', "broken JSON: Unterminated string starting at column 7"),
        ('{"a": "\t"}', "broken JSON: Invalid control character at column 8"),
        ('{"a": "b\0c"}', "broken JSON: NUL byte at column 9, as a file has that was not written to its end"),
        ("\0" * 20, "broken JSON: NUL byte at column 1, as a file has"),
        (
            '{"a": 1}\r{"a": 2}',
            "broken JSON: more text after the end of the value at column 10; lines end with a "
            "carriage return alone: tr",
        ),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_read(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{LINES}\n{line}\n{LINES}\n", "utf-8", newline="")
    found = records(path)
    assert [isinstance(each, Record) for each in found] == [True, True, False, True, True]
    assert isinstance(found[2], BadRecord) and found[2].place == "line 3"
    assert found[2].problem.startswith(problem)


@pytest.mark.parametrize("as_list", [False, True])
def test_what_only_looks_broken_is_read(tmp_path: Path, as_list: bool) -> None:
    """Long numbers, NaN and infinite numbers, and byte order marks where files were joined."""
    path = tmp_path / "data.json"
    rows = [f'{{"a": {value}, "b": "c"}}' for value in ("9" * 5000, "-" + "9" * 4400, "NaN", "-Infinity", "1e999")]
    path.write_text("[" + ",\n".join(rows) + "]" if as_list else "\n\ufeff".join(rows), "utf-8")
    found = records(path)
    assert [isinstance(each, Record) and each.values["b"] for each in found] == ["c"] * 5
    assert isinstance(found[0], Record) and str(found[0].values["a"]) == "a number of 5,000 digits"
    assert isinstance(found[1], Record) and json_type(found[1].values["a"]) == "a number of 4,400 digits"
    names = [json_type(each.values["a"]) for each in found[2:] if isinstance(each, Record)]
    assert names[0].startswith("NaN, a missing value") and names[1:] == ["a number beyond the range of floats"] * 2
    assert json_type(4) == json_type(0.5) == "a number"


def test_entries_with_a_key_twice_are_named_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1, "a": 2},\n{"a": 3}]')
    problem = "the key 'a' is there twice; one of its values would be lost"
    assert records(path) == [BadRecord("entry 1 (line 1)", problem), Record("entry 2 (line 2)", {"a": 3})]


@pytest.mark.parametrize("number", ["NaN", "1e999", "9" * 5000])
def test_a_number_that_json_lacks_is_no_part_of_a_tool(number: str) -> None:
    value = JsonReader().decode(number)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"most": [value]}}}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert convert({"messages": turns, "tools": tools}).problems[0].startswith("'tools': expected JSON; found ")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": value}}}]}
    problem = convert({"messages": [turns[0], call]}).problems[0]
    assert problem.startswith("message 2: 'tool_calls': expected JSON; found ")


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(LINES.encode() + b"\n" + '{"a": "Größe"}'.encode("latin1"))
    assert records(path)[-1] == BadRecord("line 3", "not UTF-8: byte 0xf6 at byte 10 of the line")
    path.write_bytes(f"[\n{LINES.replace(chr(10), ',')},\n".encode() + '{"a": "Größe"}]'.encode("latin1"))
    error = refused(path)
    assert error.found == "line 3: byte 0xf6" and "UTF-8" in error.what


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"a": 1},\n {"a": 2}\n {"a": 3}]', "line 3: expected ',' or ']' after entry 2"),
        ('[{"a": 1},\n {"a": 2', "line 2: Expecting ',' delimiter at column 9"),
        ('[{"a": 1},\n {"a": "2', "line 2: Unterminated string starting at column 8"),
        ('[{"a": 1}\n', "line 2: the list does not end"),
        ('[{"a": 1},\n{"b":: 2}]', "line 2: Expecting value at column 6"),
        ('[{"a": 1}] {"b": 2', "line 1: Expecting ',' delimiter"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json_over_lines_is_named(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, "utf-8")
    assert found in str(refused(path))


def test_what_is_broken_in_a_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("question,answer\na,b,c\nd\n\ne,f\n")
    found = records(path)
    assert found[:2] == [
        BadRecord("line 2", "expected 2 fields, as the header has; found 3"),
        BadRecord("line 3", "expected 2 fields, as the header has; found 1"),
    ]
    assert found[2] == Record("line 5", {"question": "e", "answer": "f"})
    path.write_text("question,question\na,b\n")
    assert "'question'" in str(refused(path))
    path.write_text('question,answer\na,"b\n')
    assert "line 2" in str(refused(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LINES.encode("utf-16-le"), ("UTF-16LE without a byte order mark", "iconv -f UTF-16LE -t UTF-8")),
        (b"PK\x03\x04....", ("a zip archive", "unzip")),
        (b"PK\x03\x04....archive/data.pkl", ("a checkpoint of PyTorch",)),
        (b"PK\x03\x04....[Content_Types].xml", ("a document of Excel or Word", "CSV")),
        (b"PK\x03\x04....a.npy", ("an archive of arrays of NumPy",)),
        (b"SQLite format 3\x00....", ("SQLite", "sqlite3 -json")),
        (b"\x80\x04\x95....", ("a pickle, which is never loaded",)),
        (b"version https://git-lfs.github.com/spec/v1\n", ("a pointer of Git LFS", "git lfs pull")),
        (b"<!DOCTYPE html>\n<html>", ("a page of HTML",)),
        (b"\x00\x01\x02\x03" * 90, ("of no known format",)),
        (b"Once upon a time.\nThe end.\n", ("plain text", "jq -Rsc")),
        (b"a" * 257 + b"ustar" + b"\x00" * 300, ("a tar archive", "tar -xf")),
    ],
)  # fmt: skip
def test_other_formats_are_named_with_the_command_that_helps(
    tmp_path: Path, content: bytes, words: tuple[str, ...]
) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    text = str(refused(path))
    assert all(word in text for word in words), text
    assert "latin1" not in text


def test_a_record_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_records, "LONGEST_RECORD", 2000)
    monkeypatch.setattr(text_records, "_BLOCK", 100)
    path = tmp_path / "data"
    for begin, end in (('{"data": "', '"}'), ('[{"data": "', '"}]'), ("question,answer\na,", "")):
        path.write_text(begin + "a" * 5000 + end)
        assert "too long" in refused(path).what


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", "\n".encode("utf-16")])
def test_an_empty_file_has_no_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    assert records(path) == []


def test_a_missing_file_is_named_and_a_pipe_refused(tmp_path: Path) -> None:
    import os

    assert "No such file" in str(refused(tmp_path / "none.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in str(refused(tmp_path / "pipe"))

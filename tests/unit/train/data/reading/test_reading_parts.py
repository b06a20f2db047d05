"""Small parts of the reading of data: each boundary, each branch of a problem, whole lines of remarks and errors."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading import data_files, examples, formats, records, table_records, text_records
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.reading.formats import format_of
from mixtral_run.train.data.reading.json_values import JsonReader


@pytest.mark.parametrize(
    ("line", "column"),
    [
        (r'"\ud800"', 2),
        (r'"\udbff"', 2),
        (r'"\udc00"', 2),
        (r'"\udfff"', 2),
        (r'"\ud7ff\ue000"', None),
        (r'"\ud800\udc00"', None),
        (r'"\udbff\udfff"', None),
        (r'"\ud800\udc00\ud801"', 14),
        (r'"\ud800 \udc00"', None),  # two halves: either may be meant
        (r'"\ud800\ud800\udc00"', 2),
        (r'"\\ud800 \ud800"', 10),
        (r'"\n\t\uDBFF"', 6),
        (r'"\udbff\ue000"', 2),
        (r'"\udc01\udc02\ud800"', None),  # three halves
        (r'"\ud800\udbff"', None),
        ("", None),
        (None, None),
    ],
)
def test_the_column_of_half_a_surrogate_pair(line: str | None, column: int | None) -> None:
    expected = f" (column {column} of the line)" if column is not None else ""
    assert examples._surrogate_column(line) == expected


def test_keys_that_are_not_used_in_words() -> None:
    few = Counter({"a": 2000, "b" * 90: 1})
    start = "Keys that are not used, with the number of examples: "
    assert examples._unused(few) == f"{start}'a' (2,000), '{'b' * 80}' (1)."
    many = Counter({f"key{number:02d}": 50 - number for number in range(12)})
    shown = ", ".join(f"'key{number:02d}' ({50 - number})" for number in range(10))
    assert examples._unused(many) == f"{start}{shown} and 2 more."
    assert examples._unused(Counter({f"k{n}": 1 for n in range(10)})).count("more") == 0


def stream_of(tmp_path: Path, *files: str, **options: Any) -> examples.ExampleStream:
    for number, content in enumerate(files):
        (tmp_path / f"{number}.jsonl").write_text(content)
    names = [str(tmp_path / f"{number}.jsonl") for number in range(len(files))]
    return read_examples(names, ReadOptions(**options), "data_path")


GOOD = '{"instruction": "a", "response": "b"}\n'


def test_remarks_in_whole_lines(tmp_path: Path) -> None:
    trimmed = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ' \
              '{"role": "user", "content": "c"}]}\n'  # fmt: skip
    stream = stream_of(tmp_path, "", GOOD + trimmed, "\n", "3\n" * 25, skip_bad_examples=True)
    assert len(list(stream)) == 2 and stream.counts_by_source == [0, 2, 0, 0]
    places = "; ".join(f"line {n} of 3.jsonl: expected a JSON object; found a number" for n in range(1, 11))
    assert stream.remarks_on_content() == [
        "2 files without a record: 0.jsonl, 2.jsonl.",
        "1 conversation does not end with the assistant: what follows its last answer is left out.",
        f"25 examples left out, as not usable: {places}; and 15 more.",
    ]
    again = stream_of(tmp_path, *[""] * 11, trimmed * 2 + "3\n", skip_bad_examples=True)
    list(again)
    assert again.remarks_on_content() == [
        f"11 files without a record: {', '.join(f'{n}.jsonl' for n in range(10))}, ….",
        "2 conversations do not end with the assistant: what follows its last answer is left out.",
        "1 example left out, as not usable: line 3 of 11.jsonl: expected a JSON object; found a number.",
    ]


@pytest.mark.parametrize(
    ("content", "skip", "what", "found", "next_command"),
    [
        ("3\n" + GOOD, False, "Some training data cannot be used.", "1 of 2 examples that cannot be used",
         "correct them, or --skip-bad-examples to leave them out"),
        ("3\n", False, "Some training data cannot be used.", "1 of 1 example that cannot be used", "correct them"),
        ("3\n", True, "The training data contain no usable example.", "1 that cannot be used",
         "mixtral-run data check"),
        ("", False, "The training data contain no example.", "an empty file", "the same command with a file"),
    ],
)  # fmt: skip
def test_errors_of_a_whole_reading(
    tmp_path: Path, content: str, skip: bool, what: str, found: str, next_command: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        stream_of(tmp_path, content, skip_bad_examples=skip).check()
    error = caught.value
    assert (error.what, error.found, error.where) == (what, found, f"--data-path {tmp_path / '0.jsonl'}")
    assert str(error.next_command).startswith(next_command)
    assert error.next_command == next_command or found != "1 of 1 example that cannot be used"


@pytest.mark.parametrize(
    ("preferences", "method"), [(None, ""), ("pairs", " --method dpo"), ("unpaired", " --method kto")]
)
def test_fields_that_nothing_has(tmp_path: Path, preferences: str | None, method: str) -> None:
    fields = {"question": "q", "answer": "response"}
    stream = stream_of(tmp_path, GOOD, fields=fields, preferences=preferences, skip_bad_examples=True)
    with pytest.raises(ConfigError) as caught:
        list(stream.examples())
    assert caught.value.problems == ("--field question=q: found no key 'q'",)
    assert f"mixtral-run data check{method}, without --field" in str(caught.value.next_command)
    # Without a record nothing is known about its keys; of a validation set they may be others.
    list(stream_of(tmp_path, "", fields={"question": "q"}).examples())
    list(
        read_examples([str(tmp_path / "0.jsonl")], ReadOptions(fields={"question": "q"}), "valid_data_path").examples()
    )


def test_all_sources_that_cannot_be_read_are_reported(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("3\n")
    names = [str(tmp_path / each) for each in ("gone-1.jsonl", "bad.jsonl", "gone-2.jsonl")]
    with pytest.raises(ConfigError) as caught:
        list(read_examples(names).examples())
    text = str(caught.value)
    assert all(name in text for name in names) and "line 1: expected a JSON object" in text


def test_columns_and_records_of_one_name() -> None:
    reader = JsonReader()
    assert reader.decode('{"a": 1, "b": 1, "c": 1, "b": 1, "c": 2}') == {"a": 1, "b": 1, "c": 2}
    assert reader.twice == "b"
    assert reader.decode(f'{{"{"x" * 90}": 1, "{"x" * 90}": 1}}') and str(reader.problem)[:90].endswith(f"'{'x' * 80}'")
    assert reader.decode('{"a": 1, "b": 2}') == {"a": 1, "b": 2} and reader.problem is None
    with pytest.raises(ConfigError) as refused:
        records.refuse_same_names(["b", "a", "b", "c", "a"], "where")
    assert refused.value.found == "'a', 'b'"
    records.refuse_same_names(["a", "b"], "where")
    types = [records.json_type(each) for each in ({}, [], "", True, None, 1, 1.0, b"")]
    assert types == ["an object", "a list", "text", "true or false", "null", "a number", "a number", "a bytes"]


def test_limits_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_records.too_long("where", "line 3").found == "line 3: more than 64 MiB"
    assert (records.LONGEST_RECORD, text_records._BLOCK, formats.HEAD_BYTES) == (67_108_864, 1_048_576, 65_536)
    line = b'{"text": "abcdefgh"}\n'
    for module in (records, text_records):
        monkeypatch.setattr(module, "LONGEST_RECORD", len(line))
    assert len(list(text_records.jsonl_records(io.BytesIO(line * 2), "utf-8", "w"))) == 2
    with pytest.raises(ConfigError, match="too long"):
        list(text_records.jsonl_records(io.BytesIO(line + b" " + line), "utf-8", "w"))
    text = line.decode()
    assert len(list(text_records.text_lines(io.BytesIO(text.encode("utf-16")), "utf-16", "w"))) == 1
    with pytest.raises(ConfigError, match="too long"):
        list(text_records.text_lines(io.BytesIO(b"x" * (len(line) + 1)), "utf-8", "w"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b'{"a": 1}\n', ("JSONL", "utf-8", ",", None)),
        ("a.jsonl", b'{"a":\n1}', ("JSON", "utf-8", ",", None)),
        ("a.jsonl", b'{"a":\n{"b": 1}', ("JSONL", "utf-8", ",", None)),
        ("a.jsonl", b'{"a":\n[1]', ("JSONL", "utf-8", ",", None)),
        ("a.jsonl", b'{"a":', ("JSONL", "utf-8", ",", None)),
        ("a.jsonl", b'\n \n  {"a": 1}', ("JSONL", "utf-8", ",", None)),
        ("a.jsonl", b"[" * 3, ("JSON", "utf-8", ",", None)),
        ("a.json", b"a,b\n", ("JSONL", "utf-8", ",", None)),
        ("a.json", b"prompt,b\n", ("CSV", "utf-8", ",", None)),
        ("a.csv", b"x\n", ("CSV", "utf-8", ",", None)),
        ("a.tsv", b"x\n", ("CSV", "utf-8", ",", None)),
        ("a.txt", b'"a;b";c\td\te\n', ("CSV", "utf-8", "\t", None)),
        ("a.txt", b'"prompt"\r\n', ("CSV", "utf-8", ",", None)),
        ("a.txt", b"a|b", ("CSV", "utf-8", "|", None)),
        ("a.csv", "\ufeffa,b".encode(), ("CSV", "utf-8-sig", ",", None)),
        ("a.csv", "a,b".encode("utf-16"), ("CSV", "utf-16", ",", None)),
        ("a.csv", "a,b".encode("utf-32"), ("CSV", "utf-32", ",", None)),
        ("a.csv", b" \n", (None, "utf-8", ",", None)),
    ],
)
def test_formats_by_content(tmp_path: Path, name: str, content: bytes, expected: tuple[Any, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    found = format_of(tmp_path / name, "where")
    assert (found.name, found.encoding, found.delimiter, found.compression) == expected


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"just a text", "plain text"),
        (b"\n\n<html>", "a page of HTML"),
        (b"a\0" * 9, "UTF-16LE without"),
        (b"\0a" * 9, "UTF-16BE without"),
        (b"a\0b\0" + b"ab" * 9, "of no known format"),
        (b"a\0" * 9 + b"\0\0", "of no known format"),
        (b"x" * 257 + b"ustar" + b"\0" * 9, "a tar archive"),
        (b"x" * 257 + b"ustar", "a tar archive"),
        (b"\x80\x04pickle", "a pickle"),
    ],
)
def test_other_content_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=f"The data are {what}"):
        format_of(tmp_path / "a.txt", "where")


def test_heads_are_read_until_they_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "HEAD_BYTES", 10)
    asked: list[int] = []
    pieces = [b"abcd", b"efgh", b"ij", b"kl"]
    stream: Any = SimpleNamespace(read=lambda size: asked.append(size) or (pieces.pop(0) if pieces else b""))
    assert formats._read_head(stream) == b"abcdefghij" and asked == [10] * 3 and len(pieces) == 1
    assert formats._read_head(stream) == b"kl"


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    damaged = formats._damaged("gzip", "where", ValueError("line\nmore"))
    assert (damaged.found, formats._damaged("gzip", "where", EOFError()).found) == ("line", "EOFError")
    for compression, error, what in (
        ("gzip", OSError("not gzip"), "are compressed with gzip"),
        ("gzip", OSError(5, "Input/output error"), "cannot be read"),
        (None, OSError("odd"), "cannot be read"),
    ):
        (tmp_path / "a").write_bytes(b"")
        with pytest.raises(ConfigError, match=what), formats.open_bytes(tmp_path / "a", compression, "where"):
            raise error


def test_names_that_are_left_out() -> None:
    assert data_files._left_out(["a"]) == "1 file is left out: a"
    assert data_files._left_out(list("abcde")) == "5 files are left out: a, b, c, d, e"
    assert data_files._left_out(list("abcdef")) == "6 files are left out: a, b, c, d, e, …"


@pytest.mark.parametrize(
    ("splits", "chosen"), [(["test", "train"], "train"), (["test"], "test"), (["a", "b"], None), ([], None)]
)
def test_the_split_that_is_read(splits: list[str], chosen: str | None) -> None:
    if chosen is not None:
        assert table_records.chosen_split(splits, "where", "x/y") == chosen
        return
    with pytest.raises(ConfigError, match="several splits") as caught:
        table_records.chosen_split(splits, "where", "x/y")
    assert (caught.value.expected, caught.value.found) == ("x/y:SPLIT", ", ".join(splits) or "no split")


def test_rows_are_numbered_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch at most `_BATCH_ROWS` rows are Python objects at a time. Null keys of structures are dropped."""
    monkeypatch.setattr(table_records, "_BATCH_ROWS", 2)
    seen: list[int] = []

    class Batch:
        def __init__(self, rows: list[Any]) -> None:
            self.rows, self.num_rows = rows, len(rows)

        def slice(self, begin: int, length: int) -> Batch:
            return Batch(self.rows[begin : begin + length])

        def to_pylist(self) -> list[Any]:
            seen.append(len(self.rows))
            return self.rows

    batches = [Batch([{"a": number, "b": None} for number in range(5)]), Batch([{"a": [{"c": None}]}])]
    found = list(table_records._rows(batches))
    assert [each.place for each in found] == [f"row {number}" for number in range(1, 7)]
    assert [each.values for each in found] == [*({"a": number} for number in range(5)), {"a": [{}]}]
    assert seen == [2, 2, 1, 1]


def test_json_in_blocks_counts_lines_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size of block gives the same values, places and errors."""
    values = [{"a": number, "b": ["x" * number, {}]} for number in range(6)]
    good = json.dumps(values, indent=1)
    bad = good.replace('"a": 4', '"a": x')
    lines = good.splitlines()
    starts = [number for number, line in enumerate(lines, 1) if line == " {"]
    wrong = next(number for number, line in enumerate(bad.splitlines(), 1) if '"a": x' in line)
    column = bad.splitlines()[wrong - 1].index("x") + 1
    for block in (1, 3, 7, 50, 10**6):
        monkeypatch.setattr(text_records, "_BLOCK", block)
        found: Any = list(text_records.json_records(io.BytesIO(good.encode()), "utf-8", "w"))
        assert [each.values for each in found] == values
        assert [each.place for each in found] == [f"entry {n} (line {line})" for n, line in enumerate(starts, 1)]
        with pytest.raises(ConfigError) as caught:
            list(text_records.json_records(io.BytesIO(bad.encode()), "utf-8", "w"))
        assert caught.value.found == f"line {wrong}: Expecting value at column {column}"
    for text, where in (("[{}\n{}]", "line 2: expected ',' or ']' after entry 1"),
                        ("[{},\n", "line 2: the list does not end; its ']' is missing")):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            list(text_records.json_records(io.BytesIO(text.encode()), "utf-8", "w"))
        assert caught.value.found == where
    two: Any = list(text_records.json_records(io.BytesIO(b"[{}] [{}, {}]\n{}"), "utf-8", "w"))
    assert [each.place for each in two] == [
        "entry 1 (line 1)", "entry 1 (line 1)", "entry 2 (line 1)", "entry 3 (line 2)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "on_hub", "inside"),
    [
        (None, False, ""),
        ("", False, ""),
        ("my", False, ""),
        ("a", False, " (a)"),
        ("z", False, " (z)"),
        ("z", True, ""),
    ],
)
def test_where_a_file_inside_a_source_is(name: str | None, on_hub: bool, inside: str) -> None:
    source: Any = SimpleNamespace(name="in/my", path=Path("in/my"), on_hub=on_hub)
    stream: Any = SimpleNamespace(_setting="data_path")
    assert examples.ExampleStream._where(stream, source, name) == f"--data-path in/my{inside}"

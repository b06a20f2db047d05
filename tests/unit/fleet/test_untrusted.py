"""Text and names from hosts: no control sequence reaches a terminal, no name leaves its folder."""

from __future__ import annotations

import time
from pathlib import PurePosixPath

import pytest

from mixtral_run.fleet.untrusted import folded, local_name, local_path, one_line, parse_json, printable


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[Hcleared", "cleared"),
        ("\x1b]0;another title\x07text", "text"),
        ("\x1b]52;c;Y3VybCBldmls\x1b\\text", "text"),
        ("\x1b]8;;http://evil/\x1b\\click\x1b]8;;\x1b\\", "click"),
        ("\x1bP+q544e\x1b\\text", "text"),
        ("\x1bcreset \x1b(0charset", "reset charset"),
        ("\x9b31mred", "red"),
        ("\x9d0;title\x9ctext", "text"),
        ("\x1b]0;never ended\nnext line", "0;never ended\nnext line"),
        ("\x9d0;never ended\x9d0;title\x9ctext", "0;never endedtext"),
        ("\x1b]0;never ended\x900;title\x07text", "0;never endedtext"),
        ("\x1b\x1b[2J[2Jtwice", "[2Jtwice"),
        ("ab\x08\x08cd\x07\x00\x7f", "abcd"),
        ("evil \u202egpj.exe", "evil gpj.exe"),
        ("\ud800", "\ufffd"),
    ],
)
def test_control_sequences_are_removed_and_the_text_remains(hostile: str, shown: str) -> None:
    assert printable(hostile) == shown


@pytest.mark.parametrize(
    "plain",
    ["", "iteration 10/10 | loss 1.2", "a\tb\nc\n", "✓ done · 45 % █████▌    | 3/7 [00:01<00:02]", "日本 é ñ", "[31m"],
)
def test_plain_output_stays_as_it_is(plain: str) -> None:
    assert printable(plain) == plain


def test_a_redrawn_line_hides_nothing() -> None:
    assert printable("gpu-01 | bad\rgpu-02 | good\r\n") == "gpu-01 | bad\ngpu-02 | good\n"
    assert printable("10%\r 20%\r 30%") == "10%\n 20%\n 30%"


def test_no_input_leaves_a_control_character() -> None:
    pieces = ["\x1b", "[", "]", "0;", "\x07", "\x1b\\", "\x9b", "\x9c", "P", "m", "\r", "x", "\x1b[", "\n"]
    for first in pieces:
        for second in pieces:
            for third in pieces:
                text = printable(first + second + third + "end")
                assert not any(character < " " and character not in "\n\t" for character in text)
                assert not any("\x7f" <= character <= "\x9f" for character in text)


@pytest.mark.parametrize(
    "piece",
    [
        "\x1b]",
        "\x1b[",
        "\x1b[0;",
        "\x1bP",
        "\x1b",
        "\r",
        *(chr(code) for code in range(0x80, 0xA0)),
        "\x90\x98",
        "\x9dx",
    ],
)
def test_a_long_hostile_text_takes_no_time(piece: str) -> None:
    began = time.monotonic()
    printable(piece * 200_000)
    printable("\x1b[" + "0" * 1_000_000)
    assert time.monotonic() - began < 5


def test_a_quoted_text_is_one_short_line() -> None:
    assert one_line("a\x1b[1m\n  b\rc") == "a b c"
    assert len(one_line("x" * 1000)) == 200


def test_json_strings_are_made_printable_at_every_depth() -> None:
    text = r'{"a\u001b[31m": ["\u009b2J", {"x": "\ud800\u0007"}, 1, 1.5, null, true]}'
    assert parse_json(text) == {"a": ["", {"x": "\ufffd"}, 1, 1.5, None, True]}


@pytest.mark.parametrize(
    "text", ["", "[", "[" * 100_000, '{"a":' * 6000 + "1" + "}" * 6000, "NaN", "[-Infinity]", "1e999", "9" * 5000]
)
def test_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/", "a\nb", "a\x1b[31m", "\x00", "a\x7f", "\x9bm", "\udcff", "a\u202eb", "a" * 256]
)
def test_a_name_that_is_no_plain_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        local_name(name)


@pytest.mark.parametrize("name", ["adapter", "it's $(an) adapter", "..a", "-rf", "é", "a" * 255, ".hidden"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert local_name(name) == name


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/etc/passwd", "absolute"), ("../a", r"\.\."), ("a/../../b", r"\.\."), ("a/..", r"\.\."), ("", "empty"),
        (".", "empty"), ("a/\x1b[m", "control"), ("peft/" + "a" * 5000, "5,000 bytes"),
        ("a/" * 101, "101 parts"), ("a/" * 500_000, "500,000 parts"), (("a" * 250 + "/") * 12, "3,011 bytes"),
    ],
)  # fmt: skip
def test_a_path_that_leaves_its_folder_is_refused(path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        local_path(path)


def test_a_path_within_its_folder_is_taken() -> None:
    assert str(local_path("./peft//sub/a")) == "peft/sub/a"
    assert len(local_path("a/" * 100).parts) == 100


@pytest.mark.parametrize("other", ["PEFT/Stra\u00dfe-\u00e9", "peft/strasse-E\u0301", "pe\u200cft/STRASSE-\u00c9"])
def test_paths_that_some_filesystem_takes_for_the_same_are_folded_to_one(other: str) -> None:
    assert folded(PurePosixPath(other)) == folded(PurePosixPath("peft/strasse-\u00e9"))
    assert folded(PurePosixPath(other)) != folded(PurePosixPath("peft/strasse-e"))

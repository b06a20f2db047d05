"""The exception tree: exit codes, the text of a message, the way through JSON and back."""

import errno
import json

import pytest

from mixtral_run.errors import (
    EXIT_CODES,
    ConfigError,
    MixtralRunError,
    Stopped,
    WeightsError,
    described,
    from_mapping,
    from_os_error,
    to_mapping,
)


def test_exit_codes() -> None:
    assert {code: error.__name__ for code, error in EXIT_CODES.items()} == {
        1: "MixtralRunError",
        2: "ConfigError",
        3: "HostError",
        4: "CheckFailed",
        5: "WeightsError",
        6: "TrainingError",
    }


def test_message_has_every_part_in_order() -> None:
    error = ConfigError("What.", where="here", expected="a", found="b", next_command="c", problems=["one", "two"])
    assert str(error).splitlines() == [
        "What.",
        "  - one",
        "  - two",
        "  where:    here",
        "  expected: a",
        "  found:    b",
        "  next:     c",
    ]


def through_json(error: MixtralRunError) -> MixtralRunError:
    return from_mapping(json.loads(json.dumps(to_mapping(error))))


@pytest.mark.parametrize("error_class", [*EXIT_CODES.values(), Stopped])
def test_errors_survive_json(error_class: type[MixtralRunError]) -> None:
    error = error_class("What.", where="here", expected="a", found="b", next_command="c", problems=["one", "two"])
    again = through_json(error)
    assert type(again) is error_class
    assert vars(again) == vars(error)
    assert again.args == error.args


def test_problems_added_later_survive_too() -> None:
    error = WeightsError("What.")
    error.problems = ("late",)
    assert "late" in str(through_json(error))


def test_only_classes_of_the_tree_are_built() -> None:
    values = {"class": "SystemExit", "what": "What.", "exit_code": 5, "problems": "none"}
    assert type(from_mapping(values)) is WeightsError
    assert type(from_mapping(values | {"exit_code": [5]})) is MixtralRunError


def test_errors_of_the_system_are_translated_or_left_alone() -> None:
    full = from_os_error(OSError(errno.ENOSPC, "No space left on device", "/out"))
    assert (type(full), full.where if full else None) == (WeightsError, "/out")
    assert isinstance(from_os_error(PermissionError(errno.EACCES, "Permission denied", "/out")), ConfigError)
    assert from_os_error(FileNotFoundError(errno.ENOENT, "No such file", "/out")) is None


def test_an_error_about_a_name_that_is_not_utf_8_can_be_written_as_json() -> None:
    error = ConfigError("no \udcff", where="a\udcff.jsonl", problems=["b\udc80: \u00e9"])
    for each in (described(error), described(ValueError("c\udcff")), to_mapping(error)):
        json.dumps(each, ensure_ascii=False).encode("utf-8")
    found = described(error)
    assert (found["what"], found["where"], found["problems"]) == ("no \\udcff", "a\\udcff.jsonl", ["b\\udc80: \u00e9"])
    assert found["expected"] is None and found["exit_code"] == 2


def test_an_error_cannot_change_the_terminal() -> None:
    error = ConfigError("a\x1b[2J", where="b\x1b]0;x\x07", found="c\u202e\udcff\r", problems=["d\x9b1m: é\t日"])
    assert str(error) == ("a\\x1b[2J\n  - d\\x9b1m: é\t日\n  where:    b\\x1b]0;x\\x07\n  found:    c\\u202e\\udcff\\r")
    assert described(error)["where"] == "b\x1b]0;x\x07"

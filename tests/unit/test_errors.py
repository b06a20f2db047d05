"""The exception tree: exit codes, what a message says, pickling."""

import pickle

import pytest

from mixtral_run.errors import EXIT_CODES, ConfigError, MixtralRunError, WeightsError


def test_exit_codes_are_the_designs() -> None:
    assert {code: error.__name__ for code, error in EXIT_CODES.items()} == {
        1: "MixtralRunError",
        2: "ConfigError",
        3: "HostError",
        4: "CheckFailed",
        5: "WeightsError",
        6: "TrainingError",
    }


def test_message_tells_everything_in_order() -> None:
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


@pytest.mark.parametrize("error_class", EXIT_CODES.values())
def test_errors_survive_pickling(error_class: type[MixtralRunError]) -> None:
    error = error_class("What.", where="here", problems=["one"])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is error_class
    assert str(again) == str(error)


def test_problems_added_later_survive_too() -> None:
    error = WeightsError("What.")
    error.problems = ("late",)
    assert "late" in str(pickle.loads(pickle.dumps(error)))

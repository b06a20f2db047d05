"""The exception tree. Each class is one exit code; each message says what, where, expected, found and what next."""

from __future__ import annotations

from collections.abc import Sequence


class MixtralRunError(Exception):
    """Any failure that a person can act on. Printed by `cli.main` without a traceback.

    `faults` holds one line for each thing that is wrong, so that all of them are told at once. Instances survive
    pickling: they cross process boundaries.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        next_command: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.next_command = next_command
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  - {problem}" for problem in self.problems]
        labeled = (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("next", self.next_command),
        )
        lines += [f"  {label + ':':<9} {value}" for label, value in labeled if value is not None]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__))


def _rebuild(error_class: type[MixtralRunError], state: dict[str, object]) -> MixtralRunError:
    error = error_class(str(state["what"]))
    error.__dict__.update(state)
    return error


class ConfigError(MixtralRunError):
    """A flag, a config file or an input file is wrong; nothing was started."""

    exit_code = 2


class HostError(MixtralRunError):
    """A host could not be reached, refused, or failed while it was being set up."""

    exit_code = 3


class CheckFailed(MixtralRunError):
    """A check ran to its end and the answer is no (smoke, rehearse, verify)."""

    exit_code = 4


class WeightsError(MixtralRunError):
    """A weights file or checkpoint is missing, truncated, corrupt or of another model."""

    exit_code = 5


class TrainingError(MixtralRunError):
    """A process of a training or generating job failed."""

    exit_code = 6


class Stopped(MixtralRunError):
    """A job was asked to end, and did."""

    exit_code = 130


EXIT_CODES: dict[int, type[MixtralRunError]] = {
    error.exit_code: error
    for error in (MixtralRunError, ConfigError, HostError, CheckFailed, WeightsError, TrainingError)
}


def described(error: BaseException) -> dict[str, object]:
    """An error as JSON values: the parts of its message, and the exit code where it is one of the kit's."""
    if not isinstance(error, MixtralRunError):
        return {"what": str(error) or type(error).__name__}
    parts = ("what", "where", "expected", "found", "next_command", "exit_code")
    return {name: getattr(error, name) for name in parts} | {"problems": list(error.problems)}


_LONGEST_LIST = 20


def shortened(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are: a missing shard makes hundreds."""
    if len(lines) <= _LONGEST_LIST:
        return lines
    return [*lines[:_LONGEST_LIST], f"… and {len(lines) - _LONGEST_LIST} more"]


def joined(errors: list[MixtralRunError]) -> MixtralRunError:
    """One error that tells all of them; of the first one's class, so that its exit code stands."""
    if len(errors) == 1:
        return errors[0]
    lines = [str(error).replace("\n", "\n    ") for error in errors]
    return type(errors[0])(f"{len(errors)} things stand in the way.", problems=lines)

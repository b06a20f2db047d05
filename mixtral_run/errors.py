"""The exception tree. Each class has one exit code; a message says what failed, where, and what to do next."""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Mapping, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, turn the direction of a text, or cannot be printed."""


def escaped(text: str) -> str:
    """Return a text for a terminal: characters that would change it are written out. Line ends and tabs stay."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class MixtralRunError(Exception):
    """A failure that the user can act on. `cli.main` prints it without a traceback.

    `problems` holds one line for each thing that is wrong, so that the user sees all of them at once.
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
        # Names of files, keys of data and answers of hosts are not trusted.
        return escaped("\n".join(lines))


class ConfigError(MixtralRunError):
    """A flag, a config file or an input file is wrong; nothing was started."""

    exit_code = 2


class HostError(MixtralRunError):
    """A host could not be reached, refused the login, or failed during provisioning."""

    exit_code = 3


class CheckFailed(MixtralRunError):
    """A check (smoke, rehearse, verify) ran to its end and did not pass."""

    exit_code = 4


class WeightsError(MixtralRunError):
    """A weights file or checkpoint is missing, truncated, corrupt or belongs to another model."""

    exit_code = 5


class TrainingError(MixtralRunError):
    """A process of a training or generation job failed."""

    exit_code = 6


class Stopped(MixtralRunError):
    """A job was asked to stop, and stopped."""

    exit_code = 130


EXIT_CODES: dict[int, type[MixtralRunError]] = {
    error.exit_code: error
    for error in (MixtralRunError, ConfigError, HostError, CheckFailed, WeightsError, TrainingError)
}

INCURABLE = tuple(error.exit_code for error in (ConfigError, HostError, CheckFailed, WeightsError))
"""Exit codes of a job that fails in the same way however often it is started."""

_CLASSES: dict[str, type[MixtralRunError]] = {each.__name__: each for each in (*EXIT_CODES.values(), Stopped)}
_TEXTS = ("what", "where", "expected", "found", "next_command")


def described(error: BaseException) -> dict[str, object]:
    """Return an error as JSON values: the parts of its message, and the exit code of a MixtralRunError.

    Names of files that are not UTF-8 have bytes that no UTF-8 text can hold; they are written out.
    """
    if not isinstance(error, MixtralRunError):
        return {"what": _encodable(str(error) or type(error).__name__)}
    values = {name: getattr(error, name) for name in _TEXTS}
    texts: dict[str, object] = {name: None if text is None else _encodable(str(text)) for name, text in values.items()}
    return {**texts, "exit_code": error.exit_code, "problems": [_encodable(each) for each in error.problems]}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def to_mapping(error: MixtralRunError) -> dict[str, object]:
    """Return an error as JSON values from which `from_mapping` rebuilds it in another process."""
    return {"class": type(error).__name__, **described(error)}


def from_mapping(values: Mapping[str, object]) -> MixtralRunError:
    """Rebuild an error from `to_mapping`'s values: by its class's name, or by its exit code if the name is unknown.

    Only the classes of this module are built, whatever the values say.
    """
    exit_code = values.get("exit_code")
    by_code = {**EXIT_CODES, Stopped.exit_code: Stopped}.get(exit_code) if isinstance(exit_code, int) else None
    error_class = _CLASSES.get(str(values.get("class")), by_code or MixtralRunError)
    problems = values.get("problems")
    error = error_class(str(values.get("what")), problems=[str(each) for each in _list(problems)])
    for name in _TEXTS[1:]:
        value = values.get(name)
        setattr(error, name, None if value is None else str(value))
    return error


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Error numbers that a disk gives wherever it is written to."""

PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Error numbers that a path of the user's may cause wherever it is used. Checks before the work report them in better
words, and code that expects another error number reports that one itself."""


def from_os_error(error: OSError) -> MixtralRunError | None:
    """Translate an OSError into a MixtralRunError. Return None if its number is in neither list above."""
    if error.errno in DISK_ERRORS:
        return WeightsError(
            "A file cannot be written.",
            where=str(error.filename) if error.filename else None,
            found=error.strerror,
            next_command="df -h, then the same command again",
        )
    if error.errno in PATH_ERRORS and error.filename:
        return ConfigError(
            "A file or folder cannot be used.",
            where=str(error.filename),
            expected="a path that this user may read, and may write to if the command writes there",
            found=error.strerror,
            next_command=f"ls -ld {shlex.quote(str(error.filename))}",
        )
    return None


_LONGEST_LIST = 20


def shortened(lines: list[str]) -> list[str]:
    """Return the first lines and a count of the others: one missing shard causes hundreds of lines."""
    if len(lines) <= _LONGEST_LIST:
        return lines
    return [*lines[:_LONGEST_LIST], f"… and {len(lines) - _LONGEST_LIST} more"]


def joined(errors: list[MixtralRunError]) -> MixtralRunError:
    """Return one error that reports all of them. It has the class, and so the exit code, of the first."""
    if len(errors) == 1:
        return errors[0]
    lines = [str(error).replace("\n", "\n    ") for error in errors]
    return type(errors[0])(f"{len(errors)} things stand in the way.", problems=lines)

"""Secrets: always passed as a file that only this user can read, never as a command-line argument."""

from __future__ import annotations

import configparser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtral_run.config.home_folder import expanded
from mixtral_run.fleet.state import state_folder, write_private

KEYS = ("aws_access_key_id", "aws_secret_access_key")


def token_problem(path: Path) -> str | None:
    """Return why a file holds no token that can be used, or None. The text does not show the content.

    The role removes a byte order mark, blanks around the token and quotes, so they are no problem.
    """
    text, problem = _content(path)
    if problem is not None:
        return problem
    words = text.replace("\ufeff", "").strip().strip("\"'").split()
    if len(words) != 1:
        return f"expected one token; found {f'{len(words)} words' if words else 'nothing'}"
    if not all("!" <= letter <= "~" and letter not in "\"'=" for letter in words[0]):
        return "expected the token alone, such as hf_...; found quotes, an equals sign, or other than ASCII"
    return None


def keys_problem(path: Path) -> str | None:
    """Return why a file holds no keys that the client of S3 can use, or None. The text does not show the content."""
    text, problem = _content(path)
    if problem is not None:
        return problem
    parser = configparser.RawConfigParser(default_section="")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        found = f"other lines than NAME = VALUE ({type(error).__name__})"
    else:
        missing = [name for name in KEYS if not parser.get("default", name, fallback="").strip()]
        found = " and ".join(f"no {name}" for name in missing)
    return f"expected [default] with {' and '.join(KEYS)}, as in ~/.aws/credentials; found {found}" if found else None


def _content(path: Path) -> tuple[str, str | None]:
    """Return the text of a file without a byte order mark, and why it cannot be read, or None."""
    try:
        return path.read_text(encoding="utf-8-sig"), None
    except UnicodeDecodeError:
        return "", "expected text in UTF-8; found something else, such as UTF-16: save it as UTF-8"
    except OSError as error:
        return "", error.strerror or "it cannot be read"


@contextmanager
def token_file(source: str | None, ask: Callable[[], str]) -> Iterator[Path | None]:
    """Yield the file that holds a token.

    Args:
        source: a path; `-` for a private file with the answer of `ask`, removed afterwards; or None, which yields None.
    """
    if source is None:
        yield None
    elif source != "-":
        yield expanded(source)
    else:
        path = state_folder("tmp") / "hf-token"
        write_private(path, ask().strip() + "\n")
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

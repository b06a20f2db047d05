"""Text and names that come from hosts and jobs. Neither is trusted: a host may be damaged or hostile.

Pure functions; the standard library only.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Any, NoReturn

MAX_NAME_BYTES = 255
"""The longest file name that common filesystems accept."""
MAX_PATH_BYTES = 3000
"""The longest path below a local folder. Linux accepts 4,096 bytes, the folder included."""
MAX_PATH_PARTS = 100
"""The most parts of a path. `Path.mkdir(parents=True)` calls itself once for each folder that is missing."""

# ECMA-48 sequences in their 7-bit form (ESC …) and 8-bit form (C1). A string sequence (OSC, DCS, SOS, PM, APC) is
# removed with its content only if it is terminated on the same line: an unterminated one must not hide other text.
# The content excludes each character that begins such a sequence: a text of introducers alone is then read once, and
# not once for each introducer.
_CONTROL = re.compile(
    r"""
      (?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]                                              # CSI: colors, cursor, erase
    | (?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])                                     # title, clipboard, links, …
      [^\x07\x1b\n\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)
    | \x1b[ -/]*[0-~]                                                              # other escapes: reset, charset
    | [\x00-\x08\x0b-\x1f\x7f-\x9f]                                                # every other control character
    | [\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]                               # reordering of the text
    """,
    re.VERBOSE,
)
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\u2028\u2029]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """Return `text` without terminal control sequences. Newlines, tabs and the visible text remain.

    A carriage return becomes a newline: text after it must not overwrite text before it, such as the name of the host.
    A progress bar that redraws its line is therefore one line per redraw. Lone surrogates, which no stream can encode,
    become U+FFFD.
    """
    if text.isascii() and text.isprintable():
        return text
    return _SURROGATES.sub("\ufffd", _CONTROL.sub("", _LINE_ENDS.sub("\n", text)))


def one_line(text: str, longest: int = 200) -> str:
    """Return `text` as one printable line of at most `longest` characters, for a message that quotes it."""
    line = " ".join(printable(text).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def printable_values(value: Any) -> Any:
    """Return JSON values with every string in them, keys included, made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key) if isinstance(key, str) else key: printable_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_values(each) for each in value]
    return value


def parse_json(text: str) -> Any:
    """Return the values of a JSON text from a host, every string in them made printable.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or holds a number that is not finite.
    """
    try:
        return printable_values(json.loads(text, parse_constant=_refuse_number, parse_float=_finite))
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(one_line(text, 20))


def local_name(name: str) -> str:
    """Return `name` if it can be used as the name of one local file or folder.

    Raises:
        ValueError: the name is empty, `.` or `..`; holds a slash, a control character or an unencodable one; or is
            longer than a filesystem accepts. The message says which.
    """
    if name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file")
    if "/" in name:
        raise ValueError(f"the name {one_line(name)!r} holds a slash")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name) or printable(name) != name:
        raise ValueError(f"the name {one_line(name)!r} holds a control character")
    length = len(name.encode())
    if length > MAX_NAME_BYTES:
        raise ValueError(f"the name {one_line(name, 40)!r} has {length:,} bytes, more than {MAX_NAME_BYTES}")
    return name


def local_path(path: str) -> PurePosixPath:
    """Return a relative path from a host as the parts of a local path below some folder.

    Raises:
        ValueError: the path is absolute or empty, holds `..`, has a part that `local_name` refuses, has more than
            MAX_PATH_PARTS parts or is longer than MAX_PATH_BYTES.
    """
    if path.startswith("/"):
        raise ValueError(f"the path {one_line(path)!r} is absolute")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError(f"the path {one_line(path)!r} " + ("holds '..'" if parts else "is empty"))
    if len(parts) > MAX_PATH_PARTS:
        raise ValueError(f"the path {one_line(path[:200], 40)!r} has {len(parts):,} parts, more than {MAX_PATH_PARTS}")
    found = PurePosixPath(*(local_name(part) for part in parts))
    length = len(str(found).encode())
    if length > MAX_PATH_BYTES:
        raise ValueError(f"the path {one_line(path, 40)!r} has {length:,} bytes, more than {MAX_PATH_BYTES:,}")
    return found


def folded(path: PurePosixPath) -> PurePosixPath:
    """Return a path such that two paths are equal if some filesystem takes them for the same one.

    Filesystems of macOS and Windows ignore case and the form of Unicode characters, and HFS+ ignores format characters.
    """
    text = unicodedata.normalize("NFD", str(path))
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text.casefold()))
    return PurePosixPath("".join(character for character in text if unicodedata.category(character) != "Cf"))

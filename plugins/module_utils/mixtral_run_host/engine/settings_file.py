"""Docker's daemon.json as found on the host: read it, and say why nothing can be merged into it."""

from __future__ import annotations

import json
import os

from ..folders import open_folder

CORRECT = "correct the file (`sudo python3 -m json.tool {}` shows the place), then run the same command again"


class BadSettings(ValueError):
    """A settings file that the kit cannot merge into: expected, found and the next step."""

    def __init__(self, expected, found, step):
        super().__init__(found)
        self.expected, self.found, self.step = expected, found, step


def read_settings(path):
    """Return (settings, text) of a settings file, or ({}, None) if there is none. Raise BadSettings for another content."""
    step = CORRECT.format(path)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        if os.path.islink(path):
            raise BadSettings(
                "{} is a file, or absent".format(path), "a link to {}, which does not exist".format(os.readlink(path)),
                "create the file, or remove the link",
            ) from None  # fmt: skip
        return {}, None
    except IsADirectoryError:
        step = "move the folder away: `sudo mv {0} {0}.old`".format(path)
        raise BadSettings("{} is a file".format(path), "a folder", step) from None
    expected = "{} is a JSON object, such as {{}}".format(path)
    try:
        text = data.decode()
        settings = json.loads(text) if text.strip() else {}
    except UnicodeDecodeError as error:
        found = "bytes that are not UTF-8, in line {}".format(data.count(b"\n", 0, error.start) + 1)
        raise BadSettings(expected, found, step) from None
    except json.JSONDecodeError as error:
        found = "broken JSON in line {}, column {}: {}".format(error.lineno, error.colno, error.msg)
        raise BadSettings(expected, found, step) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or deep nesting
        raise BadSettings(expected, "JSON that cannot be read: {}".format(error), step) from None
    if not isinstance(settings, dict):
        raise BadSettings(expected, "{} in line 1: {}".format(_kind(settings), _short(text)), step)
    return settings, text


def misfits(settings, wanted, path=()):
    """Yield (name, expected, found) for each value of the file that is of another kind than the one to be merged into it.

    A merge keeps objects and lists of the host, and would have to replace a value of another kind.
    """
    for key, value in wanted.items():
        if key not in settings:
            continue
        name, found = ".".join(path + (key,)), settings[key]
        if isinstance(value, dict) and isinstance(found, dict):
            yield from misfits(found, value, path + (key,))
        elif isinstance(value, (dict, list)) and not isinstance(found, type(value)):
            yield name, _kind(value), "{}: {}".format(_kind(found), _short(json.dumps(found)))


def why_not_writable(path):
    """Return why the file, or the one that a link names, cannot be replaced, or an empty string."""
    real = os.path.realpath(path)
    for folder in (os.path.dirname(path), os.path.dirname(real)):
        try:
            os.close(open_folder(folder))
        except FileNotFoundError:
            continue
        except OSError as error:
            return "{}: {}".format(folder, error.strerror)
        if not os.access(folder, os.W_OK):
            return "{}: a file system that is mounted read-only".format(folder)
    return ""


def _kind(value):
    if isinstance(value, bool) or value is None:
        return "a constant"
    kinds = {dict: "an object", list: "a list", str: "a text"}
    return kinds.get(type(value), "a number")


def _short(text):
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:60] + " …"

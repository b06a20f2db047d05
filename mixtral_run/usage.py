"""Words of a command line that its verb does not understand: all told at once, with what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import click

FAULTS = "mixtral_run.usage_faults"
"""Where in a click context's `meta` they wait for the verb's settings, whose faults are told with them."""

_MOST_SHOWN = 3


def without_faults(command: click.Command, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that the verb can parse, and a line for each of the others.

    The word after an unknown flag counts as its value where the verb takes no plain words.
    """
    options = _options(command)
    if {"-h", "--help"} & set(words):
        return list(words), []
    takes_words = any(isinstance(each, click.Argument) for each in command.params)
    kept: list[str] = []
    faults: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*kept, word, *rest], faults
        if not word.startswith("-") or word == "-":
            if takes_words:
                kept.append(word)
            else:
                faults.append(f"{word!r}: expected a flag before it; found none")
            continue
        flag, option = _option_of(word, options)
        if option is None:
            faults.append(f"{flag}: there is no such flag{_meant(flag, options)}")
            if not takes_words and "=" not in word and rest and not rest[0].startswith("-"):
                rest.pop(0)
        elif option.is_flag and "=" in word:
            faults.append(f"{flag}: expected no value; found {word.partition('=')[2]!r}")
        elif option.is_flag or word.replace("_", "-") != flag:
            kept.append(word)
        elif not rest:
            faults.append(f"{flag}: expected a value after it; found none")
        else:
            kept += [word, rest.pop(0)]
    return kept, faults


def close_to(word: str, known: Iterable[str]) -> list[str]:
    """What was probably meant, the likeliest first; only the beginning of it may have been written."""
    known = list(known)
    names = {name[: len(word)]: name for name in known} | {name: name for name in known}
    return list(dict.fromkeys(names[each] for each in difflib.get_close_matches(word, names, _MOST_SHOWN, cutoff=0.7)))


def or_words(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _options(command: click.Command) -> dict[str, click.Option]:
    """Every spelling of every flag, with dashes."""
    found = [each for each in command.params if isinstance(each, click.Option)]
    return {name.replace("_", "-"): each for each in found for name in (*each.opts, *each.secondary_opts)}


def _option_of(word: str, options: dict[str, click.Option]) -> tuple[str, click.Option | None]:
    """The flag that a word begins with, with dashes, and its option. `-ix` is -i with the value x."""
    flag = word.partition("=")[0].replace("_", "-") if word.startswith("--") else word[:2]
    return flag, options.get(flag)


def _meant(flag: str, options: dict[str, click.Option]) -> str:
    names = [name for name in options if name.startswith("--")]
    found = [name for name in names if len(flag) > 3 and name.startswith(flag)]
    # --tp is --tensor-model-parallel-size for everybody who has used Megatron.
    found += [] if found else [name for name in names if len(flag) < 6 and _are_initials(flag[2:], name[2:])]
    found = found or [f"--{name}" for name in close_to(flag[2:], [name[2:] for name in names])]
    return f"; did you mean {or_words(found[:_MOST_SHOWN])}?" if found else ""


def _are_initials(letters: str, name: str) -> bool:
    """Whether letters are those of some of a name's words, the first among them, in their order."""
    initials = iter(part[0] for part in name.split("-") if part)
    return len(letters) > 1 and letters[0] == name[0] and all(letter in initials for letter in letters)

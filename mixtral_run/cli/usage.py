"""Words of a command line that its verb does not understand: all told at once, with what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import click

PROBLEMS = "mixtral_run.usage_faults"
"""Where in a click context's `meta` they wait for the verb's settings, whose faults are told with them."""

_MOST_SHOWN = 3


def without_problems(command: click.Command, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that the verb can parse, and a line for each of the others.

    The word after an unknown flag counts as its value where the verb takes no plain words.
    """
    options = _options(command)
    if {"-h", "--help"} & set(words):
        return list(words), []
    takes_words = any(isinstance(each, click.Argument) for each in command.params)
    kept: list[str] = []
    problems: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*kept, word, *rest], problems
        if not word.startswith("-") or word == "-":
            if takes_words:
                kept.append(word)
            else:
                problems.append(f"{word!r}: expected a flag before it; found none")
            continue
        flag, option = _option_of(word, options)
        if option is None:
            problems.append(f"{flag}: there is no such flag{_meant(flag, options)}")
            if not takes_words and "=" not in word and rest and not rest[0].startswith("-"):
                rest.pop(0)
        elif option.is_flag and "=" in word:
            problems.append(f"{flag}: expected no value; found {word.partition('=')[2]!r}")
        elif option.is_flag:
            kept.append(word)
        else:
            # --flag=value, -fvalue, or the word after.
            alone = word.replace("_", "-") == flag
            written = [word, *rest[:1]] if alone else [word]
            del rest[: len(written) - 1]
            if alone and len(written) == 1:
                wrong: str | None = "expected a value after it; found none"
            else:
                wrong = _wrong_value(option, written[1] if alone else word.partition("=")[2] or word[2:])
            kept += [] if wrong else written
            problems += [f"{flag}: {wrong}"] if wrong else []
    return kept, problems


def missing_words(command: click.Command, words: Sequence[str]) -> list[str]:
    """A line for each word that the verb needs and that is not there; words: those that it can parse."""
    options = _options(command)
    given, rest = 0, list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            given += len(rest)
            break
        if not word.startswith("-") or word == "-":
            given += 1
            continue
        flag, option = _option_of(word, options)
        if flag in ("-h", "--help"):
            return []
        if option is not None and not option.is_flag and word.replace("_", "-") == flag:
            rest.pop(0)
    needed = [each for each in command.params if isinstance(each, click.Argument) and each.required and each.nargs == 1]
    return [f"{each.metavar or each.name.upper()}: expected; found none" for each in needed[given:] if each.name]


def _wrong_value(option: click.Option, value: str) -> str | None:
    """What is expected and was found, where a value is not of the option's kind."""
    kind = option.type
    try:
        kind.convert(value, option, None)
    except click.BadParameter as error:
        if not isinstance(kind, (click.IntRange, click.types.IntParamType)):
            return error.message
        least = getattr(kind, "min", None)
        return f"expected a whole number{f', {least} or more' if least is not None else ''}; found {value!r}"
    return None


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

"""Declaration of a setting: type, default, limits, JSON form. Standard library only.

`setting(...)` declares a field once. The command line (`cli/options.py`), the JSON file that travels to the container
and the check before any work all read that declaration. `check()` reports all problems of a config at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Self

from mixtral_run.config.names.foreign_names import answer_to, answer_to_similar
from mixtral_run.config.names.store_names import store_url, url_problem, without_weight
from mixtral_run.errors import ConfigError

LAYOUT, DATA, PROMPTS, OPTIMIZER = "Model and layout", "Data", "Prompts and sampling", "Optimizer"
PREFERENCES = "Preferences"
LORA, MEMORY, PROCESSES, COMPARISON, OUTPUT = "LoRA", "Memory and precision", "Processes", "Comparison", "Output"
"""Sections of --help."""


def setting(
    default: Any = MISSING,
    *,
    help: str,  # noqa: A002 - the word that click and argparse use
    section: str = "Options",
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    aliases: tuple[str, ...] = (),
    hidden: bool = False,
    unit: str | None = None,
    positional: str | None = None,
    bare: str | None = None,
    store: str | None = None,
) -> Any:
    """Declare a field. Without a default it is required.

    Args:
        help: Text of --help, in full sentences.
        section: Section of --help.
        choices: Allowed values.
        minimum: Inclusive lower limit.
        maximum: Inclusive upper limit.
        above: Exclusive lower limit.
        aliases: Other names of the field. They are valid as hidden flags and as keys of a config file.
        hidden: True for a former setting, which --help and `config init` leave out.
        unit: GiB for an amount of memory. A value may then have a unit, such as 80GB or 80GiB.
        positional: Name of the words of the command line that give the field, as its flag does.
        bare: Value that the flag means without one. A value follows the flag only if it is one of `choices`.
        store: "input" or "output" for a path that may be the URL of a folder in an object store.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    others = {"help": help, "section": section, "aliases": aliases, "hidden": hidden, "unit": unit, "store": store}
    return field(default=default, metadata={**others, "positional": positional, "bare": bare, **limits})


SETTINGS_ERROR = "Some settings are wrong."
"""First line of an error that lists problems of settings."""
LARGEST, LARGEST_WHOLE = 1e15, 2**63 - 1
"""No amount, length or size of a job is larger; computing with larger numbers would overflow."""


def flag_of(name: str) -> str:
    """Return the flag of a field: `lora_rank` → `--lora-rank`."""
    return "--" + name.replace("_", "-")


def plain_type(annotation: Any) -> tuple[Any, bool]:
    """Split an annotation into its type without None, and True if None is allowed."""
    if isinstance(annotation, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return inner[0], True
    return annotation, False


def field_types(config_class: type) -> dict[str, Any]:
    """Return the resolved annotations of a config class by field name."""
    return typing.get_type_hints(config_class)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the configs: limits, and the way to JSON and back."""

    def problems(self) -> list[str]:
        """Return a line for each value that is wrong; an empty list if all values are valid."""
        found = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None:
                found += _limit_problems(item, value) + _store_problems(item, value)
        return found

    def check(self) -> Self:
        """Return self. Raise ConfigError with all problems if there are any."""
        problems = self.problems()
        if problems:
            raise ConfigError(SETTINGS_ERROR, problems=problems)
        return self

    def flags(self, names: Collection[str]) -> list[str]:
        """Return the words of a command line that set those fields of `names` whose values are not the default."""
        words = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name not in names or value == item.default:
                continue
            if isinstance(value, bool):
                words.append(flag_of(item.name) if value else f"--no-{flag_of(item.name)[2:]}")
            elif isinstance(value, tuple):
                # Only names from a list are separated by commas; other texts may contain them.
                texts = [",".join(value)] if item.metadata["choices"] else map(str, value)
                words += [word for text in texts for word in (flag_of(item.name), shlex.quote(text))]
            else:
                words += [flag_of(item.name), shlex.quote(format(value, _format_of(value)))]
        return words

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields as JSON values. Paths become text."""
        return {item.name: _to_json_value(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the defaults as JSON values, of the fields that have one.

        A setting that a record of an earlier version lacks had this value: a new setting's default is what the kit did
        before it.
        """
        return {
            item.name: _to_json_value(item.default) for item in dataclasses.fields(cls) if item.default is not MISSING
        }

    @property
    def continues(self) -> bool:
        """True if the settings may be those of work that began before, perhaps under an earlier version of the kit."""
        return False

    def unused(self) -> dict[str, str]:
        """Return the settings that were changed but would be ignored, and why: what was expected, and found.

        Only settings without which the result is the same. `problems` has a line for each of them.
        """
        return {}

    @classmethod
    def without_unused(
        cls, values: Mapping[str, Any], flags: Collection[str] = ()
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return JSON values without those that would be ignored, and why each of these would.

        flags: names that were given on the command line. For new work these stay, so that they are refused.
        """
        rest, _ = cls.rest_of(values)
        unused = {name: why for name, why in rest.unused().items() if rest.continues or name not in flags}
        return {name: value for name, value in values.items() if name not in unused}, unused

    def to_json(self) -> str:
        """Return the fields as the text of a JSON object."""
        return json.dumps(self.to_mapping(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def with_current_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return `values` with the current name of each field in place of an alias.

        An alias stays if its field is set as well; `from_mapping` then refuses both.
        """
        current = {alias: item.name for item in dataclasses.fields(cls) for alias in _aliases(item)}
        return {
            name if current.get(name, name) in values else current.get(name, name): value
            for name, value in values.items()
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str = "config") -> Self:
        """Build a config from JSON values. Raise ConfigError with all unknown keys, missing keys and wrong types."""
        values = cls.with_current_names(values)
        fields = {item.name: item for item in dataclasses.fields(cls)}
        problems = [_unknown(name, fields) for name in values if name not in fields]
        accepted, refused = cls._converted(values)
        if problems or refused:
            # The problems of the other fields belong to the same error: otherwise the next run would fail on them.
            others = re.compile(
                rf"(?:{'|'.join(map(re.escape, map(flag_of, refused)))})(?![\w-])" if refused else r"(?!)"
            )
            rest = [each for each in cls(**accepted).problems() if not others.search(each)]
            raise ConfigError(SETTINGS_ERROR, where=where, problems=[*problems, *refused.values(), *rest])
        return cls(**accepted)

    @classmethod
    def rest_of(cls, values: Mapping[str, Any]) -> tuple[Self, frozenset[str]]:
        """Return a config of those `values` that can be used, and the names of the fields that cannot.

        These have their default, or any value of their type.
        """
        accepted, refused = cls._converted(cls.with_current_names(values))
        return cls(**accepted), frozenset(refused)

    @classmethod
    def _converted(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values of the fields in their types, and a line for each field that is missing or wrong.

        In place of the latter's values are their default or, where they have none, any value of their type.
        """
        annotations = field_types(cls)
        accepted: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for item in dataclasses.fields(cls):
            name = item.name
            is_required = item.default is MISSING and item.default_factory is MISSING
            if is_required:
                wanted, _ = plain_type(annotations[name])
                accepted[name] = _ANY_VALUE[typing.get_origin(wanted) or wanted]
            # A name without a value in a YAML file, as `config init` writes it.
            if name not in values or (is_required and values[name] is None):
                if is_required:
                    refused[name] = f"{flag_of(name)} is required: {item.metadata.get('help', '')}"
                continue
            try:
                value = _without_unit(values[name]) if item.metadata["unit"] else values[name]
                is_tuple = typing.get_origin(plain_type(annotations[name])[0]) is tuple
                if is_tuple and isinstance(value, str) and not item.metadata["choices"]:
                    # A file may give one text where several may be given.
                    value = [value]
                accepted[name] = _from_json_value(annotations[name], value)
            except (TypeError, ValueError, OverflowError) as error:
                refused[name] = f"{flag_of(name)}: {error}"
        return accepted, refused

    @classmethod
    def from_json(cls, text: str, *, where: str = "config") -> Self:
        """Build a config from the text of a JSON object. Raise ConfigError as `from_mapping` does."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError("The config is not valid JSON.", where=where, found=str(error)) from error
        if not isinstance(values, dict):
            raise ConfigError("The config must be a JSON object.", where=where, found=type(values).__name__)
        return cls.from_mapping(values, where=where)


def _aliases(item: dataclasses.Field[Any]) -> tuple[str, ...]:
    aliases: tuple[str, ...] = item.metadata.get("aliases", ())
    return aliases


def _unknown(name: str, fields: Mapping[str, dataclasses.Field[Any]]) -> str:
    for item in fields.values():
        if name in _aliases(item):
            return f"'{name}' is another name of '{item.name}': expected one of them; found both"
    known = [each.replace("_", "-") for each in fields]

    def show(setting: str) -> str:
        return f"'{setting.replace('-', '_')}'"

    answer = answer_to(name, known, show)
    close = difflib.get_close_matches(name, [each for each in fields if not fields[each].metadata["hidden"]], 1)
    if answer is None and close:
        answer = f"did you mean '{close[0]}'?"
    answer = answer or answer_to_similar(name, known, show)
    return f"unknown setting '{name}'" + (f"; {answer}" if answer else "")


def _limit_problems(item: dataclasses.Field[Any], value: Any) -> list[str]:
    """Return a line for each limit of the field that `value` breaks."""
    limits = item.metadata
    flag = flag_of(item.name)
    found = []
    if limits.get("choices"):
        chosen = value if isinstance(value, tuple) else (value,)
        wrong = [str(each) or "''" for each in chosen if each not in limits["choices"]]
        if wrong:
            found.append(f"{flag}: expected one of {', '.join(limits['choices'])}; found {', '.join(wrong)}")
        if value == () != item.default:
            found.append(f"{flag}: expected at least one of {', '.join(limits['choices'])}; found none")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and math.isinf(value):
            found.append(f"{flag}: expected a finite number; found {value}")
        elif isinstance(value, float) and abs(value) > LARGEST:
            found.append(f"{flag}: expected a number between {-LARGEST:.0e} and {LARGEST:.0e}; found {value}")
        # `not value >= limit` instead of `value < limit`, so that NaN breaks every limit.
        if limits.get("minimum") is not None and not value >= limits["minimum"]:
            found.append(f"{flag}: expected at least {limits['minimum']}; found {value}")
        if limits.get("maximum") is not None and not value <= limits["maximum"]:
            found.append(f"{flag}: expected at most {limits['maximum']}; found {value}")
        if limits.get("above") is not None and not value > limits["above"]:
            found.append(f"{flag}: expected more than {limits['above']}; found {value}")
    return found


def _store_problems(item: dataclasses.Field[Any], value: Any) -> list[str]:
    """Return a line for each URL of an object store that the field cannot use."""
    takes_urls = item.metadata.get("store") is not None
    urls = [store_url(without_weight(each)) for each in (value if isinstance(value, tuple) else (value,))]
    found = []
    for url in urls if takes_urls or isinstance(value, Path) else ():
        problem = None if url is None else url_problem(url) if takes_urls else "expected a path; found a URL"
        found += [f"{flag_of(item.name)}: {problem}"] if problem else []
    return found


def _format_of(value: object) -> str:
    return "g" if isinstance(value, float) and float(f"{value:g}") == value else ""


_BYTES = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12}


def _without_unit(value: Any) -> Any:
    """Return `80GB` or `80 GiB` as a number of GiB. GB are powers of ten, GiB powers of two; other values stay."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?b)\s*", value, re.IGNORECASE)
    if found is None or found[2].lower() not in _BYTES:
        raise ValueError(f"expected a number of GiB, or a number with GB or GiB; found {value!r}")
    return round(float(found[1]) * _BYTES[found[2].lower()] / 2**30, 3)


def _to_json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_to_json_value(each) for each in value]
    return value


_ANY_VALUE = {Path: Path("any"), str: "any", int: 1, float: 1.0, tuple: ("any",)}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _from_json_value(annotation: Any, value: Any) -> Any:
    """Convert a JSON value to the type of a field. Raise TypeError if it is of another type."""
    wanted, optional = plain_type(annotation)
    if value is None:
        if optional:
            return None
        raise TypeError("expected a value; found null")
    if isinstance(value, str) and "\0" in value:
        raise TypeError(f"expected text without a character of code 0; found {value!r}")
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"expected a list; found {value!r}")
        inner = typing.get_args(wanted)[0]
        return tuple(_from_json_value(inner, each) for each in value)
    if wanted is Path:
        # An empty path means the current folder to Path. It usually comes from an unset shell variable.
        if not isinstance(value, (str, Path)) or value == "":
            raise TypeError(f"expected a path; found {value!r}")
        return Path(value)
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise TypeError(f"expected a number of at most {LARGEST_WHOLE}; found one of {len(str(abs(value)))} digits")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted in (int, float) and isinstance(value, bool)):
        raise TypeError(f"expected {_TYPE_NAMES[wanted]}; found {value!r}")
    return value

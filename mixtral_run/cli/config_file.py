"""Read the settings of --config FILE: JSON, YAML or TOML, by the name of the file or by its content."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_run.errors import ConfigError

_NEXT = "mixtral-run config init VERB -o FILE, which writes an example"
_FORMATS = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the settings of a file by name, with underscores in the names.

    Raises ConfigError if the file cannot be read or parsed, or if it sets a name twice.
    """
    where = str(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            "The config file cannot be read.", where=where, found=error.strerror, next_command=_NEXT
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "The config file cannot be read.", where=where, expected="text in UTF-8", found=str(error)
        ) from error
    kind = _FORMATS.get(file.suffix.lower()) or ("JSON" if text.lstrip().startswith("{") else "YAML")
    try:
        values = _PARSERS[kind](text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The config file is not valid {kind}.", where=where, found=_reason(error)) from error
    if values is None:  # A YAML file that holds comments only, as `config init` writes it.
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            "The config file must hold settings.",
            where=where,
            expected="names and values" if kind != "JSON" else "a JSON object",
            found=type(values).__name__,
            next_command=_NEXT,
        )
    return _with_underscores(values, where)


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _with_underscores(values: dict[Any, Any], where: str) -> dict[str, Any]:
    """Return the settings with `lora_rank` for `lora-rank`. Raises ConfigError if a file has both."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise ConfigError("The config file sets a name twice.", where=where, found=f"{name} and {key}")
        found[name] = value
    return found


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is set twice")
        found[name] = value
    return found


def _parse_yaml(text: str) -> Any:
    """Parse YAML with the rules of YAML 1.2 for plain values, in which `yes` is a text and `1e-4` a number.

    Raises ValueError. Only plain values, lists and mappings are built; anchors and tags are refused.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise yaml.YAMLError(f"anchors and aliases are not supported\n{event.start_mark}")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"expected a name\n{key.start_mark}")
                if key.value in lines:
                    first, second = lines[key.value], key.start_mark.line + 1
                    raise yaml.YAMLError(f"{key.value!r} is set twice, in lines {first} and {second}")
                lines[key.value] = key.start_mark.line + 1
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {}
    for name, pattern, first in (
        ("null", r"~|null|Null|NULL|", "~nN\0"),
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
         "-+.0123456789"),
    ):  # fmt: skip
        letters = ["" if each == "\0" else each for each in first]
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), letters)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


_PARSERS: dict[str, Callable[[str], Any]] = {"JSON": _parse_json, "YAML": _parse_yaml, "TOML": tomllib.loads}

"""The click option of one field of a config."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mixtral_run.cli.command import NOT_SET, OFF, Option, with_default
from mixtral_run.cli.completion import complete_choices, complete_value
from mixtral_run.config.fields import flag_of, plain_type

BY_FLAG = "_by_flag"
"""End of the name of the parameter for the flag of a positional setting, whose own name is that of the words."""
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def option_of(item: dataclasses.Field[Any], annotation: Any, name: str, *, hidden: bool = False) -> Decorator:
    """Return the click option of a field. name: the field's own name, or one of its aliases."""
    wanted, _ = plain_type(annotation)
    if item.metadata["positional"]:
        return _words_or_flag(item)
    choices = item.metadata["choices"]
    flag = flag_of(name)
    settings = {
        "cls": Option, "section": item.metadata["section"], "help": _help_text(item, wanted), "hidden": hidden
    }  # fmt: skip
    if wanted is bool:
        # The default is None instead of False: the config file may set True.
        if item.default is True:
            return click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, **settings)
        return click.option(flag, item.name, is_flag=True, flag_value=True, default=None, **settings)
    if typing.get_origin(wanted) is tuple:
        if choices:
            settings |= {"type": _comma_separated, "shell_complete": complete_choices(choices)}
            return click.option(flag, item.name, metavar="NAME,…", multiple=True, callback=_in_one, **settings)
        return click.option(flag, item.name, type=_Value(typing.get_args(wanted)[0]), multiple=True, **settings)
    if item.metadata["bare"]:
        others = [each for each in choices if each != item.metadata["bare"]]
        settings |= {"bare": item.metadata["bare"], "values": choices}
        return click.option(flag, item.name, metavar=f"[{'|'.join(others)}]", **settings)
    if choices:
        settings["shell_complete"] = complete_choices(choices)
        return click.option(flag, item.name, metavar="|".join(choices), **settings)
    return click.option(flag, item.name, type=_Value(wanted), **settings)


def _words_or_flag(item: dataclasses.Field[Any]) -> Decorator:
    """Return the click argument of a positional field, together with a flag that gives the same."""
    word = item.metadata["positional"]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        flag = click.option(
            flag_of(item.name), item.name + BY_FLAG, cls=Option, section=item.metadata["section"], multiple=True,
            metavar=word, help=f"The same as {word}. {item.metadata['help']}",
        )  # fmt: skip
        return click.argument(item.name, nargs=-1, metavar=f"{word}...")(flag(function))

    return decorate


def _help_text(item: dataclasses.Field[Any], wanted: Any) -> str:
    """Return the field's help with its default, or with a mark that it is required."""
    text: str = item.metadata["help"]
    if item.default is MISSING and item.default_factory is MISSING:
        return text + "  [required]"
    return with_default(text, _shown(item.default, wanted))


def _shown(default: Any, wanted: Any) -> str:
    if wanted is bool and default is not None:
        return "on" if default else OFF
    if default is None or default == ():
        return NOT_SET
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return f"{default:g}" if wanted is float else str(default)


class _Value(click.ParamType[Any]):
    """A value that the config checks instead of click, which would report only the first wrong value.

    Paths are not looked at either: with --on they belong to another machine.
    """

    def __init__(self, wanted: Any) -> None:
        self.name = {int: "integer", float: "float", Path: "path"}.get(wanted, "text")
        self._wanted = wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        del param, ctx
        try:
            return self._wanted(value) if self._wanted in (int, float) else value
        except ValueError:
            return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del ctx
        return complete_value(self._wanted, str(param.name), incomplete)


def _comma_separated(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Split `a,b c` into ("a", "b", "c"). An empty text becomes ("",), which the config refuses."""
    return value if isinstance(value, tuple) else tuple(value.replace(",", " ").split()) or ("",)


def _in_one(ctx: click.Context, param: click.Parameter, value: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return the names of a flag that may be given several times; None if it was not."""
    del ctx, param
    return tuple(name for names in value for name in names) or None

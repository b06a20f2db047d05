"""Click options made from the fields of a config, so that a setting is declared once."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import click

from mixtral_run.cli.host_options import VERBS as HOST_VERBS
from mixtral_run.cli.host_options import host_options, refuse_without_on, run_on_hosts, take_host_options
from mixtral_run.cli.usage import PROBLEMS
from mixtral_run.config.fields import Config, field_types, flag_of, plain_type
from mixtral_run.errors import ConfigError, described

ConfigT = TypeVar("ConfigT", bound=Config)


def config_options(
    config_class: type[ConfigT], *, errors_as_json: bool = False
) -> Callable[[Callable[[ConfigT], None]], Callable[..., None]]:
    """Give a command an option for every field of `config_class`, and --config FILE; call it with the checked config.

    A flag wins over the file, the file over the default. A required setting may come from either. Verbs that run on
    hosts also get --on and what belongs to it. errors_as_json: with --json, settings that cannot be used are told on
    stdout as well.
    """

    def decorate(function: Callable[[ConfigT], None]) -> Callable[..., None]:
        def command(**flags: Any) -> None:
            elsewhere = take_host_options(flags)
            try:
                config = merged_config(config_class, flags.pop("config"), flags)
            except ConfigError as error:
                if errors_as_json and flags.get("json"):
                    _echo_json({"ok": False, "error": described(error)})
                raise
            if "on" in elsewhere:
                run_on_hosts(function.__name__, config, elsewhere)
            else:
                refuse_without_on(elsewhere)
                function(config)

        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        decorated: Callable[..., None] = command
        if function.__name__ in HOST_VERBS:
            decorated = host_options(decorated)
        return setting_options(config_class)(decorated)

    return decorate


def setting_options(config_class: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of `config_class`, and --config FILE."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        decorated: Callable[..., None] = click.option(
            "--config",
            type=click.Path(path_type=Path, readable=False),  # what reads it tells all that is wrong
            help="JSON file of settings, named as the flags are; flags given beside it win.",
        )(function)
        annotations = field_types(config_class)
        for item in reversed(dataclasses.fields(config_class)):
            decorated = _option(item, annotations[item.name])(decorated)
        return decorated

    return decorate


def merged_config(config_class: type[ConfigT], file: Path | None, flags: dict[str, Any]) -> ConfigT:
    """The checked config of a file and the flags given beside it. Raises ConfigError with all faults.

    With them are told the words that the verb did not understand.
    """
    context = click.get_current_context()
    not_understood = context.meta.get(PROBLEMS, [])
    try:
        config = _merge(config_class, file, flags).check()
        if not_understood:
            raise ConfigError("The settings cannot be used as they are.")
    except ConfigError as error:
        error.problems = (*not_understood, *error.problems)
        error.where = error.where or "command line"
        error.next_command = error.next_command or f"{context.command_path} --help"
        raise
    return config


def _echo_json(values: dict[str, Any]) -> None:
    import json

    click.echo(json.dumps(values, indent=2, ensure_ascii=False))


def _merge(config_class: type[ConfigT], file: Path | None, flags: dict[str, Any]) -> ConfigT:
    values: dict[str, Any] = {}
    where = "command line"
    if file is not None:
        where = str(file)
        try:
            values = _read_mapping(file)
        except OSError as error:
            raise ConfigError("The config file cannot be read.", where=where, found=error.strerror) from error
    values |= {name: value for name, value in flags.items() if value is not None and value != ()}
    return config_class.from_mapping(values, where=where)


def _read_mapping(file: Path) -> dict[str, Any]:
    import json

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("The config file is not valid JSON.", where=str(file), found=str(error)) from error
    if not isinstance(values, dict):
        raise ConfigError("The config file must hold a JSON object.", where=str(file), found=type(values).__name__)
    return values


def _option(item: dataclasses.Field[Any], annotation: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    wanted, _ = plain_type(annotation)
    limits = item.metadata
    help_text = limits["help"]
    required = item.default is MISSING and item.default_factory is MISSING
    if required:
        help_text += "  [required]"
    elif item.default not in (None, False, ()) and wanted is not bool:
        default = item.default
        shown = ", ".join(default) if isinstance(default, tuple) else f"{default:g}" if wanted is float else default
        help_text += f"  [default: {shown}]"
    flag = flag_of(item.name)
    if wanted is bool:
        # None, not False, when the flag is absent: the config file may say otherwise.
        if item.default is True:
            return click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, help=help_text)
        return click.option(flag, item.name, is_flag=True, flag_value=True, default=None, help=help_text)
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)[0]
        if limits["choices"]:
            return click.option(flag, item.name, type=_comma_separated, metavar="NAME,…", help=help_text)
        return click.option(flag, item.name, type=_Value(inner), multiple=True, help=help_text)
    if limits["choices"]:
        return click.option(flag, item.name, metavar="|".join(limits["choices"]), help=help_text)
    return click.option(flag, item.name, type=_Value(wanted), help=help_text)


class _Value(click.ParamType[Any]):
    """A value that the config checks: click would tell the first that is wrong, and nothing else.

    Nor does it look at paths: with --on they are another machine's.
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


def _comma_separated(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """`a,b c` → ("a", "b", "c"). Nothing is a value as well, and a wrong one."""
    return value if isinstance(value, tuple) else tuple(value.replace(",", " ").split()) or ("",)

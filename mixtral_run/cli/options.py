"""Click options made from the fields of a config, so that a setting is declared once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from mixtral_run.cli.command import DOUBTFUL, MEANT, PROBLEMS, Option, is_about_data
from mixtral_run.cli.config_file import read_config_file
from mixtral_run.cli.host_options import SCHEDULED, host_options, refuse_without_on, run_on_hosts, take_host_options
from mixtral_run.cli.host_options import VERBS as HOST_VERBS
from mixtral_run.cli.input_problems import errors_of_inputs, input_problems
from mixtral_run.cli.json_errors import expect_json
from mixtral_run.cli.launcher_options import launch, launcher_options, take_launcher_options
from mixtral_run.cli.setting_option import BY_FLAG, Decorator, option_of
from mixtral_run.cli.stores import run_with_stores
from mixtral_run.config.fields import SETTINGS_ERROR, Config, field_types, flag_of
from mixtral_run.config.names.foreign_names import setting_meant
from mixtral_run.errors import ConfigError, joined

ConfigT = TypeVar("ConfigT", bound=Config)


def config_options(
    config_class: type[ConfigT],
) -> Callable[[Callable[[ConfigT], None]], Callable[..., None]]:
    """Give a command --config FILE and an option for every field of `config_class`; call it with the checked config.

    A flag takes precedence over the file, and the file over the default. A required setting may come from either. Verbs
    that run on hosts also get --on, --launcher and the options that belong to them.
    """

    def decorate(function: Callable[[ConfigT], None]) -> Callable[..., None]:
        def command(**flags: Any) -> None:
            given = take_host_options(flags)
            scheduled = take_launcher_options(flags) if function.__name__ in SCHEDULED else {}
            elsewhere = "on" in given or "launcher" in scheduled
            config = merged_config(config_class, flags.pop("config"), flags, on_hosts=elsewhere)
            if scheduled:
                launch(function.__name__, config, given, scheduled)
            elif "on" in given:
                run_on_hosts(function.__name__, config, given)
            else:
                refuse_without_on(given)
                run_with_stores(function, config)

        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        decorated: Callable[..., None] = command
        if function.__name__ in HOST_VERBS:
            decorated = host_options(launcher_options(decorated) if function.__name__ in SCHEDULED else decorated)
        return setting_options(config_class)(decorated)

    return decorate


def setting_options(config_class: type[Config]) -> Decorator:
    """Give a command --config FILE, an option for every field of `config_class`, and hidden options for its aliases."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        decorated: Callable[..., None] = click.option(
            "--config",
            cls=Option,
            section="Other",
            type=click.Path(path_type=Path, readable=False),  # `read_config_file` reports an unreadable file
            help="YAML, TOML or JSON file of settings, with the names of the flags. Flags on the command line take "
            "precedence. `mixtral-run config init VERB` writes one.",
        )(function)
        annotations = field_types(config_class)
        for item in reversed(dataclasses.fields(config_class)):
            for alias in item.metadata["aliases"]:
                decorated = option_of(item, annotations[item.name], alias, hidden=True)(decorated)
            decorated = option_of(item, annotations[item.name], item.name, hidden=item.metadata["hidden"])(decorated)
        return decorated

    return decorate


def merged_config(
    config_class: type[ConfigT], file: Path | None, flags: dict[str, Any], *, on_hosts: bool = False
) -> ConfigT:
    """Return the checked config of a file and of the flags given with it.

    Raises ConfigError with all problems of the settings, with the words of the command line that the verb does not
    understand, and with the inputs that are missing. on_hosts: inputs are not looked at, as they belong to a host.
    """
    context = click.get_current_context()
    not_understood = context.meta.get(PROBLEMS, [])
    flags = _with_words(config_class, flags)
    values: dict[str, Any] = {}
    in_file: dict[str, Any] = {}
    try:
        in_file = config_class.with_current_names(read_config_file(file)) if file is not None else {}
        if in_file.get("json") is True and "json" in field_types(config_class):
            expect_json(context)
        values, unused = config_class.without_unused(in_file | flags, flags)
        config = config_class.from_mapping(values, where=str(file or "command line")).check()
        if not_understood:
            raise ConfigError(SETTINGS_ERROR)
    except ConfigError as error:
        doubtful = context.meta.get(DOUBTFUL, ())
        inputs = [] if on_hosts else input_problems(config_class, values or flags, doubtful)
        names = [item.name for item in dataclasses.fields(config_class)]
        known = [name.replace("_", "-") for name in names]
        meant = context.meta.get(MEANT, set()) | {setting_meant(name, known) for name in values if name not in names}
        # A line about a value says what is wrong with it; that it is no file's name would be a second, wrong reason.
        named = tuple(each.partition(": ")[0] + ": " for each in error.problems)
        inputs = [each for each in inputs if f"{each.partition(': ')[0]}: " not in named]
        problems = [each for each in (*error.problems, *inputs) if not _is_meant(each, meant)]
        keys = [name for name, value in in_file.items() if name in names and name not in flags and value is not None]
        error.problems = (*not_understood, *(_with_key(each, keys) for each in problems))
        error.where = error.where or str(file or "command line")
        if error.next_command is None and not is_about_data(error):
            error.next_command = f"{context.command_path} --help"
        deeper = [] if on_hosts else errors_of_inputs(config_class, values or flags, doubtful)
        if deeper:
            raise joined([error, *deeper]) from None
        raise
    if unused:
        _report_unused(unused)
    return config


def _report_unused(unused: Mapping[str, str]) -> None:
    """Say which settings are not used, and why; once for a job of several processes."""
    from mixtral_run.launch import processes

    for name, why in unused.items() if processes.rank() == 0 else ():
        click.echo(f"! {flag_of(name)} is not used: {why}", err=True)


def _with_words(config_class: type[Config], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that were given; a positional setting has its words and the values of its flag."""
    found = dict(flags)
    for item in dataclasses.fields(config_class):
        if item.metadata["positional"]:
            found[item.name] = (*found.get(item.name, ()), *found.pop(item.name + BY_FLAG, ()))
    return {name: value for name, value in found.items() if value is not None and value != ()}


def _is_meant(problem: str, meant: Collection[str | None]) -> bool:
    """Return True for a line that a setting is missing for which a name of another program was given."""
    named = re.match(r"(.*?)(?: is required:|: expected .*; found (?:neither|none)$|; found neither$)", problem)
    flags = re.findall(r"--([a-z0-9-]+)", named[1]) if named else ()
    return any(flag in meant for flag in flags)


def _with_key(problem: str, keys: Collection[str]) -> str:
    """Return a line about a setting of the config file with its key in place of the flag that it begins with."""
    found = re.match(r"--([a-z0-9-]+)(?=[: ])", problem)
    name = found[1].replace("-", "_") if found else ""
    return name + problem[found.end() :] if found and name in keys else problem

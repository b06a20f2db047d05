"""Options that hand a verb over to a scheduler: `--launcher NAME` and the settings of the launchers.

They are defined here alone, and all verbs that run on hosts have them. The settings of a launcher are the fields of its
class in `mixtral_run/config/launchers/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixtral_run.cli.command import Option
from mixtral_run.cli.config_file import read_config_file
from mixtral_run.cli.setting_option import option_of
from mixtral_run.config.fields import field_types, flag_of
from mixtral_run.config.launchers.base import SCHEDULERS
from mixtral_run.config.launchers.registry import LAUNCHERS
from mixtral_run.errors import ConfigError

if TYPE_CHECKING:
    from mixtral_run.config.fields import Config

_OWN: tuple[Callable[..., Any], ...] = (
    click.option(
        "--launcher",
        cls=Option,
        section=SCHEDULERS,
        metavar="|".join(LAUNCHERS),
        help="Hand the job over to this scheduler. Paths are then paths of its nodes.",
    ),
    click.option(
        "--launcher-settings",
        cls=Option,
        section=SCHEDULERS,
        type=click.Path(path_type=Path, readable=False),
        metavar="FILE",
        help="With --launcher: YAML, TOML or JSON file of its settings. Flags take precedence.",
    ),
    click.option(
        "--dry-run",
        cls=Option,
        section=SCHEDULERS,
        is_flag=True,
        help="With --launcher: print what the scheduler would get, and submit nothing.",
    ),
)
_OWN_NAMES = ("launcher", "launcher_settings", "dry_run")


def _fields() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return field and type of each setting of all launchers, by name. Launchers may share a setting."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for kind, _ in LAUNCHERS.values():
        types = field_types(kind)
        for item in dataclasses.fields(kind):
            found.setdefault(item.name, (item, types[item.name]))
    return found


def launcher_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of this module."""
    for item, annotation in reversed(_fields().values()):
        command = option_of(item, annotation, item.name)(command)
    for option in reversed(_OWN):
        command = option(command)
    return command


def take_launcher_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of this module from a command's flags, and return those that were given."""
    taken = {name: flags.pop(name) for name in (*_OWN_NAMES, *_fields()) if name in flags}
    return {name: value for name, value in taken.items() if value is not None and value is not False and value != ()}


def launch(verb: str, config: Config, given: dict[str, Any], scheduled: dict[str, Any]) -> None:
    """Hand a verb over to the scheduler of --launcher.

    Args:
        given: options of the job, as `take_host_options` returns them.
        scheduled: options of the launcher, as `take_launcher_options` returns them.

    Raises:
        ConfigError: an option is wrong, or belongs to another launcher or to --on.
    """
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.launchers.launch_job import launch_job

    name = scheduled.pop("launcher", None)
    if name not in LAUNCHERS:
        raise ConfigError(
            "These settings need --launcher." if name is None else "There is no such launcher.",
            expected=f"--launcher {'|'.join(LAUNCHERS)}",
            found=f"--launcher {name}" if name else ", ".join(map(flag_of, scheduled)),
        )
    kind = LAUNCHERS[name][0]
    file, dry_run = scheduled.pop("launcher_settings", None), scheduled.pop("dry_run", False)
    own = {item.name for item in dataclasses.fields(kind)}
    problems = [f"{flag_of(each)}: --launcher {name} does not use it" for each in scheduled if each not in own]
    problems += ["--on: expected --on or --launcher; found both"] if "on" in given else []
    values = kind.with_current_names(read_config_file(file)) if file else {}
    values |= {each: value for each, value in scheduled.items() if each in own}
    settings = kind.from_mapping(values, where=str(file or "command line"))
    others = tuple(each for each in given if each != "on")
    launch_job(name, verb, config, JobOptions(**given), settings, others, dry_run, problems)

"""The options that send a verb to hosts: --on HOST and what belongs to it, the same for every verb that can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mixtral_run.config.fields import Config

VERBS = ("convert", "verify", "finetune", "pretrain", "generate", "export", "smoke", "rehearse")
"""Verbs that run on hosts."""

_WHERE: tuple[Callable[..., Any], ...] = (
    click.option(
        "--on", multiple=True, metavar="HOST,…", help="Run there, in the kit's container; paths are that host's."
    ),
    click.option(
        "-i", "--inventory", type=click.Path(path_type=Path), help="With --on: the inventory that names HOST."
    ),
    click.option("--detach", is_flag=True, help="With --on: start it and come back at once."),
)
_JOB: tuple[Callable[..., Any], ...] = (
    click.option("--shm-size", metavar="SIZE", help="With --on: shared memory of the container.  [default: 32g]"),
    click.option("--image", metavar="NAME", help="With --on: the image.  [default: mixtral-run:local]"),
    click.option(
        "--env", "environment", multiple=True, metavar="NAME=VALUE", help="With --on: environment, no secrets."
    ),
    click.option(
        "--ulimit", "ulimits", multiple=True, metavar="NAME=N", help="With --on: instead of the kit's; or none."
    ),
    click.option("--checkpoints-folder", metavar="FOLDER", help="With --on: the host's /checkpoints."),
    click.option("--hf-home", metavar="FOLDER", help="With --on: the host's HF cache."),
    click.option("--nccl-debug", metavar="LEVEL", help="With --on: NCCL_DEBUG, such as INFO."),
    click.option("--nccl-timeout", type=int, metavar="SECONDS", help="With --on: longest wait for other processes."),
    click.option(
        "--rendezvous-address", metavar="ADDRESS", help="With several hosts: the first one's, as they see it."
    ),
    click.option("--rendezvous-port", type=int, metavar="PORT", help="With several hosts.  [default: 29400]"),
)
_NAMES = (
    "on", "inventory", "detach", "shm_size", "image", "environment", "ulimits", "checkpoints_folder", "hf_home",
    "nccl_debug", "nccl_timeout", "rendezvous_address", "rendezvous_port",
)  # fmt: skip


def host_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options."""
    command = job_options(command)
    for option in reversed(_WHERE):
        command = option(command)
    return command


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command only those of a job's container."""
    for option in reversed(_JOB):
        command = option(command)
    return command


def take_host_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Take the options out of a command's flags; those that were not given are left out."""
    taken = {name: flags.pop(name) for name in _NAMES if name in flags}
    return {name: value for name, value in taken.items() if value not in (None, (), False)}


def run_on_hosts(verb: str, config: Config, given: dict[str, Any]) -> None:
    """Run a verb on the hosts that --on names. Raises ConfigError for more hosts than the verb can use."""
    from mixtral_run.config.verbs import LaunchConfig
    from mixtral_run.errors import ConfigError
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.jobs.run_on_hosts import run_on_hosts as job

    options = JobOptions(**given)
    hosts = [piece for word in options.on for piece in word.split(",") if piece]
    if len(hosts) > 1 and not isinstance(config, LaunchConfig):
        raise ConfigError(f"{verb} runs on one host.", found=f"--on {','.join(hosts)}")
    job(verb, config, options)


def refuse_without_on(given: dict[str, Any]) -> None:
    """Raise ConfigError where options of --on stand without it."""
    from mixtral_run.errors import ConfigError

    if given:
        named = {"environment": "--env", "ulimits": "--ulimit"}
        flags = ", ".join(named.get(name) or "--" + name.replace("_", "-") for name in given)
        raise ConfigError("These settings need --on HOST.", found=flags)

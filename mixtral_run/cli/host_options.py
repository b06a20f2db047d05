"""Options that run a verb on hosts: --on HOST and the options of its container. All verbs that have them share them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixtral_run.cli.command import Option, WholeNumber
from mixtral_run.cli.completion import complete_hosts

if TYPE_CHECKING:
    from mixtral_run.config.fields import Config

VERBS = (
    "convert",
    "verify",
    "finetune",
    "align",
    "pretrain",
    "generate",
    "chat",
    "evaluate",
    "serve",
    "export",
    "smoke",
    "rehearse",
)
"""Verbs that run on hosts."""
INTERACTIVE = ("chat",)
"""Those of them that read this terminal, and end with the connection."""
SCHEDULED = tuple(verb for verb in VERBS if verb not in (*INTERACTIVE, "serve"))
"""Those of them that a scheduler can run: jobs of the kit's own container, with an end."""

_option = partial(click.option, cls=Option, section="On hosts")


class _Times:
    """The values that --wait may have, so that the word behind a bare --wait is not taken for one."""

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and re.fullmatch(r"forever|\d+[a-z]?", word) is not None


_TARGET: tuple[Callable[..., Any], ...] = (
    _option(
        "--on",
        multiple=True,
        metavar="HOST,…",
        shell_complete=complete_hosts,
        help="Run on these hosts, in the container of mixtral-run. Paths are then paths of the host. any: on the first "
        "host of the fleet, or of -i INVENTORY, that is free and not cordoned.",
    ),
    _option("-i", "--inventory", type=click.Path(path_type=Path), help="With --on: Ansible inventory that names HOST."),
    _option(
        "--min-hosts",
        type=WholeNumber(1),
        metavar="N",
        help="With several hosts: if hosts are lost, start again on those that are left, if they are N or more. Data "
        "order and learning rate stay the same.",
    ),
    _option("--detach", is_flag=True, help="With --on or --launcher: start the job and return at once."),
)
_JOB: tuple[Callable[..., Any], ...] = (
    _option(
        "--wait",
        metavar="[TIME]",
        bare="forever",
        values=_Times(),
        help="With --on: wait until no other job uses the GPUs of the host, at most TIME, such as 30m or 2h. Without "
        "--wait a busy host is refused.",
    ),
    _option("--share", is_flag=True, help="With --on: start next to another job that uses the GPUs of the host."),
    _option("--shm-size", metavar="SIZE", help="Shared memory of the job's container.  [default: 32g]"),
    _option("--image", metavar="NAME", help="Image of the job's container.  [default: mixtral-run:local]"),
    _option(
        "--env",
        "environment",
        multiple=True,
        metavar="NAME=VALUE",
        help="Environment variable of the job. Not for secrets.",
    ),
    _option(
        "--ulimit",
        "ulimits",
        multiple=True,
        metavar="NAME=N",
        help="Limit of the job's container in place of the default ones. none: those of the Docker engine.  "
        "[default: memlock=-1, stack=67108864, nofile=1048576:1048576]",
    ),
    _option(
        "--checkpoints-folder",
        metavar="FOLDER",
        help="Folder of each host that is /checkpoints in the job's container.  "
        "[default: that of the inventory or the last bootstrap]",
    ),
    _option(
        "--hf-home",
        metavar="FOLDER",
        help="Folder of each host that is the Hugging Face cache of the job.  "
        "[default: that of the inventory or the last bootstrap]",
    ),
    _option(
        "--max-restarts",
        type=WholeNumber(0),
        metavar="N",
        help="Start the whole job again up to N times if it fails in a way that repeating can cure. A fine-tuning then "
        "continues from its newest good checkpoint.  [default: 0; with --launcher slurm: 3]",
    ),
    _option("--nccl-debug", metavar="LEVEL", help="Value of NCCL_DEBUG for the job, such as INFO."),
    _option(
        "--nccl-timeout",
        type=WholeNumber(),
        metavar="SECONDS",
        help="Longest time that a process of the job waits for the others.",
    ),
    _option(
        "--rendezvous-address",
        metavar="ADDRESS",
        help="With several hosts: address of the first host, as the other hosts reach it.",
    ),
    _option(
        "--rendezvous-port",
        type=WholeNumber(),
        metavar="PORT",
        help="With several hosts: port of the first host.  [default: 29400]",
    ),
)
_NAMES = (
    "on", "inventory", "min_hosts", "detach", "shm_size", "image", "environment", "ulimits", "checkpoints_folder",
    "hf_home", "max_restarts", "wait", "share", "nccl_debug", "nccl_timeout", "rendezvous_address",
    "rendezvous_port",
)  # fmt: skip


def host_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of this module."""
    command = job_options(command)
    for option in reversed(_TARGET):
        command = option(command)
    return command


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a job's container only."""
    for option in reversed(_JOB):
        command = option(command)
    return command


def take_host_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of this module from a command's flags, and return those that were given."""
    taken = {name: flags.pop(name) for name in _NAMES if name in flags}
    return {name: value for name, value in taken.items() if value is not None and value is not False and value != ()}


def run_on_hosts(verb: str, config: Config, given: dict[str, Any]) -> None:
    """Run a verb on the hosts of --on. Raise ConfigError if they are more than the verb can use."""
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.jobs.run_on_hosts import run_on_hosts as job

    options = JobOptions(**given)
    if verb in INTERACTIVE:
        from mixtral_run.fleet.jobs.interactive import run_here

        sys.exit(run_here(verb, config, options))
    if verb == "serve" and getattr(config, "prove", None) is None:
        from mixtral_run.config.verbs.serve import ServeConfig
        from mixtral_run.fleet.jobs.serve import serve

        assert isinstance(config, ServeConfig)
        serve(config, options)
        return
    job(verb, config, options)


def refuse_without_on(given: dict[str, Any]) -> None:
    """Raise ConfigError if options of --on were given without it."""
    from mixtral_run.errors import ConfigError

    if given:
        named = {"environment": "--env", "ulimits": "--ulimit"}
        flags = ", ".join(named.get(name) or "--" + name.replace("_", "-") for name in given)
        raise ConfigError("These settings need --on HOST or --launcher NAME.", found=flags)

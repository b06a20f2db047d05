"""`mixtral-run shell`."""

from __future__ import annotations

import sys
from typing import Any

import click

from mixtral_run.cli.command import Option, VerbCommand
from mixtral_run.cli.host_options import host_options, take_host_options


@click.command(
    cls=VerbCommand,
    context_settings={"allow_interspersed_args": False},
    examples=("shell --on gpu-01", "shell --on gpu-01 --dry-run nvidia-smi topo -m"),
)
@click.argument("words", nargs=-1, metavar="[COMMAND]...", type=click.UNPROCESSED)
@click.option("--dry-run", cls=Option, section="Output", is_flag=True, help="Print the command, and run nothing.")
@host_options
def shell(words: tuple[str, ...], dry_run: bool, **flags: Any) -> None:
    """Open a shell in the container of a job on a host, with the GPUs, limits and folders that jobs have.

    COMMAND runs in place of the shell. The container is removed at the end; /checkpoints stays. A job may start on the
    host meanwhile, except while a process of the shell uses a GPU.
    """
    from mixtral_run.errors import ConfigError
    from mixtral_run.fleet.jobs.interactive import run_shell
    from mixtral_run.fleet.jobs.job_spec import JobOptions

    given = take_host_options(flags)
    if "on" not in given:
        raise ConfigError("shell runs on a host.", expected="--on HOST", found="none")
    sys.exit(run_shell(JobOptions(**given), words, dry_run=dry_run))

"""`mixtral-run teardown`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from mixtral_run.cli.command import Option, VerbCommand, WholeNumber
from mixtral_run.cli.completion import complete_hosts

_on_hosts = partial(click.option, cls=Option, section="Hosts")
_secret = partial(click.option, cls=Option, section="Login and secrets")
_provision = partial(click.option, cls=Option, section="Provisioning")
_output = partial(click.option, cls=Option, section="Output")


@click.command(
    cls=VerbCommand,
    examples=("teardown ubuntu@gpu-01 --check --diff", "teardown gpu-01 gpu-02 -e @variables.yml --yes --json"),
)
@click.argument("hosts", nargs=-1, shell_complete=complete_hosts, metavar="[[USER@]HOST[:PORT]]...")
@_on_hosts(
    "-i",
    "--inventory",
    type=click.Path(path_type=Path),
    help="Ansible inventory, in place of hosts on the command line.",
)
@_on_hosts(
    "--limit",
    metavar="HOST,…",
    help="Only these hosts: names, groups of the inventory, or patterns of Ansible.",
)
@_provision("--check", is_flag=True, help="Change nothing; list what would go.")
@_provision("--diff", is_flag=True, help="Show the changes of files in the list.")
@_provision("--tags", metavar="ROLE,…", help="Only these roles, such as swap,acceptance.")
@_provision(
    "-e",
    "--extra-vars",
    multiple=True,
    metavar="NAME=VALUE|@FILE",
    help="Variables of the roles, the same as those of bootstrap.",
)
@_provision("-y", "--yes", is_flag=True, help="Do not ask.")
@_output("--json", "as_json", is_flag=True, help="Print the result as JSON. Needs --yes or --check.")
@_secret("-K", "--ask-become-pass", is_flag=True, help="Prompt for the sudo password.")
@_on_hosts(
    "-f",
    "--forks",
    type=WholeNumber(1),
    help="Largest number of hosts that Ansible works on in parallel.  [default: 50]",
)
def teardown(hosts: tuple[str, ...], yes: bool, as_json: bool, ask_become_pass: bool, **flags: Any) -> None:
    """Take back from hosts what bootstrap added: settings, packages, swap, image and records.

    First lists what goes and what stays, and asks. Refuses hosts that run jobs. Checkpoints and models stay.
    """
    from mixtral_run.errors import ConfigError
    from mixtral_run.fleet.bootstrap import teardown as job

    if as_json and not (yes or flags["check"]):
        raise ConfigError("--json cannot be combined with a question.", expected="--yes or --check beside it")
    flags["tags"] = tuple(tag for tag in (flags["tags"] or "").split(",") if tag)
    password = str(click.prompt("sudo password", hide_input=True, err=True)) if ask_become_pass else None
    request = job.TeardownRequest(hosts=hosts, become_password=password, **flags)
    end = job.teardown(request, lambda words: yes or _ask(words), sys.stderr if as_json else sys.stdout)
    if end is None:
        click.echo("Nothing was changed.")
        return
    if flags["check"]:
        click.echo(job.listing(end.progress.removals), err=as_json)
    click.echo(end.text, err=as_json)
    if as_json:
        click.echo(end.to_json())
    end.raise_if_bad()


def _ask(words: str) -> bool:
    from mixtral_run.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError(
            "teardown asks before it changes anything, and there is no terminal to ask at.",
            next_command="the same command with --yes",
        )
    return click.confirm(words, err=True)

"""`mixtral-run bootstrap`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import click

from mixtral_run.cli.command import Option, VerbCommand, WholeNumber
from mixtral_run.cli.completion import complete_hosts

_on_hosts = partial(click.option, cls=Option, section="Hosts")
_secret = partial(click.option, cls=Option, section="Login and secrets")
_provision = partial(click.option, cls=Option, section="Provisioning")


@click.command(
    cls=VerbCommand,
    examples=(
        "bootstrap ubuntu@gpu-01 ubuntu@gpu-02 --ask-become-pass",
        "bootstrap --inventory inventory/hosts.yml --tags docker,swap --check --diff",
    ),
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
@_provision("--check", is_flag=True, help="Change nothing; report what would change. Works on bare hosts.")
@_provision("--diff", is_flag=True, help="Show the changes of files.")
@_provision("--tags", metavar="ROLE,…", help="Only these roles, such as docker,swap.")
@_provision("-e", "--extra-vars", multiple=True, metavar="NAME=VALUE|@FILE", help="Variables of the roles.")
@_secret("--hf-token-file", metavar="FILE", help="File with a Hugging Face token. -: prompt for the token.")
@_secret(
    "--store-keys-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the keys of S3, in the form of ~/.aws/credentials, for jobs with --save s3://… on the hosts.",
)
@_secret("-K", "--ask-become-pass", is_flag=True, help="Prompt for the sudo password.")
@_secret(
    "-k", "--ask-pass", is_flag=True, help="Prompt for the SSH password once, to install your SSH key on the hosts."
)
@_secret(
    "--accept-new-host-key", multiple=True, metavar="HOST", help="Accept the new host key of a host that was reimaged."
)
@_on_hosts(
    "-f",
    "--forks",
    type=WholeNumber(1),
    help="Largest number of hosts that Ansible works on in parallel.  [default: 50]",
)
@_on_hosts("--serial", metavar="N|N%", help="Number of hosts at a time. When one host finishes, the next one starts.")
@_on_hosts(
    "--retry",
    is_flag=True,
    help="Repeat the last bootstrap on the hosts that failed. Flags are added to those of the last bootstrap.",
)
def bootstrap(hosts: tuple[str, ...], retry: bool, ask_pass: bool, hf_token_file: str | None, **flags: Any) -> None:
    """Set up hosts over SSH, from bare machines to hosts that run jobs. A repeated run only changes what differs.

    Without HOST and -i: all hosts that bootstrap has set up from this machine.
    """
    from mixtral_run.errors import ConfigError
    from mixtral_run.fleet.bootstrap import bootstrap as job
    from mixtral_run.fleet.secrets import token_file

    flags["tags"] = tuple(tag for tag in (flags["tags"] or "").split(",") if tag)
    if retry:
        if hosts or flags["inventory"] or flags["limit"]:
            raise ConfigError(
                "--retry takes the hosts that failed in the last bootstrap.",
                found="--retry with hosts, --inventory or --limit",
            )
        request = job.last_request().again_with(flags)
    else:
        flags["forks"] = flags["forks"] or job.DEFAULT_FORKS
        request = job.BootstrapRequest(hosts=hosts, **flags)
    with token_file(hf_token_file, lambda: _prompt("Hugging Face token")) as token:
        request = dataclasses.replace(
            request,
            hf_token_file=token or request.hf_token_file,
            login_password=_prompt("SSH password") if ask_pass else None,
            become_password=_prompt("sudo password") if request.ask_become_pass else None,
        )
        end = job.bootstrap(request)
    click.echo(end.text)
    end.raise_if_bad()


def _prompt(what: str) -> str:
    """Read a secret from the terminal without showing it."""
    return str(click.prompt(what, hide_input=True, err=True))

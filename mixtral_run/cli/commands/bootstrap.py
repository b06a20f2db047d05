"""`mixtral-run bootstrap`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("hosts", nargs=-1, metavar="[[USER@]HOST[:PORT]]...")
@click.option("-i", "--inventory", type=click.Path(path_type=Path), help="Ansible inventory instead of hosts by name.")
@click.option("--limit", metavar="HOST,…", help="Only these hosts; * and ! as Ansible knows them.")
@click.option("--check", is_flag=True, help="Change nothing; tell what would change. Works on bare hosts.")
@click.option("--diff", is_flag=True, help="Show how files change.")
@click.option("--tags", metavar="ROLE,…", help="Only these roles, such as docker,swap.")
@click.option("-e", "--extra-vars", multiple=True, metavar="NAME=VALUE|@FILE", help="Variables of the roles.")
@click.option("--hf-token-file", metavar="FILE", help="File with a Hugging Face token; - asks for it.")
@click.option("-K", "--ask-become-pass", is_flag=True, help="Ask for the password of sudo.")
@click.option("-k", "--ask-pass", is_flag=True, help="Ask for the login's password once, to put your SSH key there.")
@click.option("--accept-new-host-key", multiple=True, metavar="HOST", help="Take the new key of a reimaged host.")
@click.option("-f", "--forks", type=click.IntRange(min=1), help="Hosts at the same time.  [default: 50]")
@click.option("--serial", metavar="N|N%", help="So many hosts at a time: another begins once one is finished.")
@click.option(
    "--retry", is_flag=True, help="The last bootstrap again for hosts that failed; flags only add to its own."
)
def bootstrap(hosts: tuple[str, ...], retry: bool, ask_pass: bool, hf_token_file: str | None, **flags: Any) -> None:
    """Set hosts up over SSH: from nothing to machines where jobs run. Again, it changes what differs and nothing else.

    Without HOST and -i: all hosts that were set up from here before.
    """
    from mixtral_run.errors import ConfigError
    from mixtral_run.fleet.bootstrap import bootstrap as job
    from mixtral_run.fleet.secrets import token_file

    flags["tags"] = tuple(tag for tag in (flags["tags"] or "").split(",") if tag)
    if retry:
        if hosts or flags["inventory"] or flags["limit"]:
            raise ConfigError(
                "--retry takes the hosts that failed in the last bootstrap.",
                found="hosts, --inventory or --limit beside it",
            )
        request = job.last_request().again_with(flags)
    else:
        flags["forks"] = flags["forks"] or job.DEFAULT_FORKS
        request = job.BootstrapRequest(hosts=hosts, **flags)
    with token_file(hf_token_file, lambda: _ask("Hugging Face token")) as token:
        request = dataclasses.replace(
            request,
            hf_token_file=token or request.hf_token_file,
            login_password=click.prompt("SSH password", hide_input=True, err=True) if ask_pass else None,
            become_password=click.prompt("sudo password", hide_input=True, err=True)
            if request.ask_become_pass
            else None,
        )
        end = job.bootstrap(request)
    click.echo(end.text)
    end.raise_if_bad()


def _ask(what: str) -> str:
    return str(click.prompt(what, hide_input=True, err=True))

"""`mixtral-run up`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from mixtral_run.cli.command import Option, VerbCommand
from mixtral_run.cli.completion import complete_hosts
from mixtral_run.cli.host_options import job_options, take_host_options
from mixtral_run.cli.options import merged_config, setting_options
from mixtral_run.config.verbs.training import UpConfig

_on_hosts = partial(click.option, cls=Option, section="Hosts")
_provision = partial(click.option, cls=Option, section="Provisioning")
_secret = partial(click.option, cls=Option, section="Login and secrets")


@click.command(
    cls=VerbCommand,
    examples=(
        "up ubuntu@gpu-01 --data-path my.jsonl",
        "up gpu-01 --data-path my.jsonl --base-precision fp8 --hf-token-file token.txt --output-path my-adapter",
    ),
)
@click.argument("host", shell_complete=complete_hosts, metavar="[USER@]HOST[:PORT]")
@setting_options(UpConfig)
@job_options
@_on_hosts("-i", "--inventory", type=click.Path(path_type=Path), help="Ansible inventory that names HOST.")
@_provision("-e", "--extra-vars", multiple=True, metavar="NAME=VALUE|@FILE", help="Variables of the Ansible roles.")
@_secret("--hf-token-file", type=click.Path(path_type=Path), metavar="FILE", help="File with a Hugging Face token.")
@_secret("-K", "--ask-become-pass", is_flag=True, help="Prompt for the sudo password.")
def up(host: str, extra_vars: tuple[str, ...], hf_token_file: Path | None, ask_become_pass: bool, **flags: Any) -> None:
    """Go from a bare HOST to an adapter on this machine: bootstrap, convert, finetune, export, fetch.

    Steps that are already done are skipped.
    """
    from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.up import up as job

    given = take_host_options(flags)
    config = merged_config(UpConfig, flags.pop("config"), flags, on_hosts=True)
    password = str(click.prompt("sudo password", hide_input=True, err=True)) if ask_become_pass else None
    request = BootstrapRequest(
        hosts=(host,),
        inventory=given.get("inventory"),
        extra_vars=extra_vars,
        hf_token_file=hf_token_file,
        ask_become_pass=ask_become_pass,
        become_password=password,
    )
    job(config, request, JobOptions(on=(host,), **given))

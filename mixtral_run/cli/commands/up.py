"""`mixtral-run up`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mixtral_run.cli.host_options import job_options, take_host_options
from mixtral_run.cli.options import merged_config, setting_options
from mixtral_run.config.verbs import UpConfig


@click.command()
@click.argument("host", metavar="[USER@]HOST[:PORT]")
@setting_options(UpConfig)
@job_options
@click.option("-i", "--inventory", type=click.Path(path_type=Path), help="The inventory that names HOST.")
@click.option("-e", "--extra-vars", multiple=True, metavar="NAME=VALUE|@FILE", help="Variables of the roles.")
@click.option(
    "--hf-token-file", type=click.Path(path_type=Path), metavar="FILE", help="File with a Hugging Face token."
)
@click.option("-K", "--ask-become-pass", is_flag=True, help="Ask for the password of sudo.")
def up(host: str, extra_vars: tuple[str, ...], hf_token_file: Path | None, ask_become_pass: bool, **flags: Any) -> None:
    """From a bare HOST to your adapter, here: bootstrap, convert, finetune, export, fetch. What is done is skipped."""
    from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.up import up as job

    elsewhere = take_host_options(flags)
    config = merged_config(UpConfig, flags.pop("config"), flags)
    password = str(click.prompt("sudo password", hide_input=True, err=True)) if ask_become_pass else None
    request = BootstrapRequest(
        hosts=(host,),
        inventory=elsewhere.get("inventory"),
        extra_vars=extra_vars,
        hf_token_file=hf_token_file,
        ask_become_pass=ask_become_pass,
        become_password=password,
    )
    job(config, request, JobOptions(on=(host,), **elsewhere))

"""`mixtral-run rehearse`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.trial import RehearseConfig


@click.command(cls=VerbCommand, examples=("rehearse --device cpu", "rehearse --host --work-path rehearsal"))
@config_options(RehearseConfig)
def rehearse(config: RehearseConfig) -> None:
    """Run the whole job at small size on this machine and prove every step. Needs no download and no GPU.

    With --host the rehearsal includes the provisioning of a throw-away host, which needs a Docker engine.
    """
    if config.host:
        from mixtral_run.fleet.rehearse_host import rehearse_host

        rehearse_host(config)
        return
    from mixtral_run.trial.rehearse import rehearse as job

    job(config)

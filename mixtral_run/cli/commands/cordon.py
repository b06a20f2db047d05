"""`mixtral-run cordon` and `uncordon`: set hosts apart from new jobs, and take that back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from mixtral_run.cli.command import Option, VerbCommand

_option = partial(click.option, cls=Option, section="Hosts")
_inventory = _option(
    "-i", "--inventory", type=click.Path(path_type=Path), help="Ansible inventory that names the hosts."
)


@click.command(
    cls=VerbCommand, examples=('cordon gpu-03 --reason "Xid 79 on GPU 5"', "cordon gpu-01 gpu-02 --reason maintenance")
)
@click.argument("hosts", nargs=-1, required=True, metavar="[USER@]HOST[:PORT]...")
@_option("--reason", required=True, metavar="TEXT", help="Why. `status` and refused jobs show it.")
@_inventory
def cordon(hosts: tuple[str, ...], reason: str, inventory: Path | None) -> None:
    """Let no new job of --on start on hosts, whoever starts it. Running jobs continue. Who and why is recorded there.

    Slurm and Kubernetes have their own: scontrol update nodename=N state=drain, and kubectl cordon N.
    """
    from mixtral_run.errors import ConfigError
    from mixtral_run.fleet.cordon import cordon as set_apart
    from mixtral_run.fleet.selection import hosts_of

    if not reason.strip():
        raise ConfigError("--reason: expected a text that says why; found none.")
    chosen = hosts_of(hosts, inventory, None)
    for host, before in zip(chosen, set_apart(chosen, reason), strict=True):
        click.echo(f"✓ {host.name} takes no new jobs" + (f"; it was {before}" if before else ""))


@click.command(cls=VerbCommand, examples=("uncordon gpu-03", "uncordon gpu-01 gpu-02 -i inventory.yml"))
@click.argument("hosts", nargs=-1, required=True, metavar="[USER@]HOST[:PORT]...")
@_inventory
def uncordon(hosts: tuple[str, ...], inventory: Path | None) -> None:
    """Let hosts take jobs again."""
    from mixtral_run.fleet.cordon import uncordon as take_back
    from mixtral_run.fleet.selection import hosts_of

    chosen = hosts_of(hosts, inventory, None)
    for host, before in zip(chosen, take_back(chosen), strict=True):
        click.echo(f"✓ {host.name} takes jobs" + (f"; it was {before}" if before else "; it was not cordoned"))

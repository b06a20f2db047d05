"""`mixtral-run status`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from mixtral_run.cli.command import Option, VerbCommand
from mixtral_run.cli.completion import complete_hosts

_on_hosts = partial(click.option, cls=Option, section="Hosts")
_output = partial(click.option, cls=Option, section="Output")


@click.command(cls=VerbCommand, examples=("status", "status gpu-01 gpu-02 --html fleet.html"))
@click.argument("hosts", nargs=-1, shell_complete=complete_hosts, metavar="[[USER@]HOST[:PORT]]...")
@_on_hosts(
    "-i",
    "--inventory",
    type=click.Path(path_type=Path),
    help="Ansible inventory, in place of hosts on the command line.",
)
@_on_hosts("--limit", metavar="HOST,…", help="Only these hosts. * and ! have the meaning that Ansible gives them.")
@_output("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@_output("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML page that works offline.")
@_on_hosts("--checkpoints-folder", metavar="FOLDER", help="Folder of the checkpoints on the hosts, if not the default.")
@_on_hosts("--hf-home", metavar="FOLDER", help="Hugging Face cache on the hosts, if not the default.")
@_on_hosts("--image", metavar="NAME", help="Container image of the jobs.  [default: mixtral-run:local]")
def status(
    hosts: tuple[str, ...],
    inventory: Path | None,
    limit: str | None,
    as_json: bool,
    html: Path | None,
    checkpoints_folder: str | None,
    hf_home: str | None,
    image: str | None,
) -> None:
    """Show the state of every host, and where a host differs from the majority. Changes nothing.

    Without HOST and -i: all hosts that bootstrap has set up from this machine.
    """
    from mixtral_run.errors import HostError
    from mixtral_run.fleet.selection import hosts_of
    from mixtral_run.fleet.status.read_fleet import read_fleet, summary_rows, to_json
    from mixtral_run.terminal.report import Report

    given = {"checkpoints": checkpoints_folder, "hf_home": hf_home, "image": image}
    folders = {name: value for name, value in given.items() if value}
    statuses = read_fleet(hosts_of(hosts, inventory, limit), folders=folders)
    if html is not None:
        from mixtral_run.fleet.status.page import write_page

        write_page(html, statuses)
    if as_json:
        click.echo(to_json(statuses), nl=False)
    else:
        report = Report()
        report.table(*summary_rows(statuses))
        if html is not None:
            report.done(f"The page is {html}")
    unreachable = [one.name for one in statuses if not one.reachable]
    if unreachable:
        raise HostError(f"{len(unreachable)} of {len(statuses)} hosts cannot be reached: {', '.join(unreachable)}")

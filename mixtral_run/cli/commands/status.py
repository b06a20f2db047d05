"""`mixtral-run status`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("hosts", nargs=-1, metavar="[[USER@]HOST[:PORT]]...")
@click.option("-i", "--inventory", type=click.Path(path_type=Path), help="Ansible inventory instead of hosts by name.")
@click.option("--limit", metavar="HOST,…", help="Only these hosts; * and ! as Ansible knows them.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page to read offline.")
@click.option(
    "--checkpoints-folder", metavar="FOLDER", help="Where checkpoints lie on the hosts, if not at the default."
)
@click.option("--hf-home", metavar="FOLDER", help="The hosts' HF cache, if not at the default.")
@click.option("--image", metavar="NAME", help="The image that jobs run in.  [default: mixtral-run:local]")
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
    """Say what every host has, and what one has otherwise than most. Changes nothing.

    Without HOST and -i: all hosts that were set up from here before.
    """
    from mixtral_run.errors import HostError
    from mixtral_run.fleet.selection import hosts_of
    from mixtral_run.fleet.status.read_fleet import read_fleet, summary_rows, to_json
    from mixtral_run.report import Report

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
    dark = [one.name for one in statuses if not one.reachable]
    if dark:
        raise HostError(f"{len(dark)} of {len(statuses)} hosts cannot be reached: {', '.join(dark)}")

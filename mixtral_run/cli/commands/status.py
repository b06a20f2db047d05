"""`mixtral-run status`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mixtral_run.cli.command import Option, VerbCommand
from mixtral_run.cli.completion import complete_hosts

if TYPE_CHECKING:
    from mixtral_run.fleet.hosts import Host

_on_hosts = partial(click.option, cls=Option, section="Hosts")
_output = partial(click.option, cls=Option, section="Output")


@click.command(
    cls=VerbCommand,
    examples=("status gpu-01 gpu-02 --html fleet.html", "status --network gpu-01 gpu-02 gpu-03"),
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
@_output("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@_output("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML page that works offline.")
@_on_hosts(
    "--network",
    is_flag=True,
    help="Measure an all-reduce between each two of the hosts instead, in job containers: the hosts must be idle.",
)
@_on_hosts(
    "--network-floor",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="With --network: least bandwidth, in 10^9 bytes a second. Less than half of the best pair's is always slow.",
)
@_output(
    "--history", is_flag=True, help="Show who changed what and when on each host instead, as the hosts recorded it."
)
@_on_hosts(
    "--checkpoints-folder",
    metavar="FOLDER",
    help="Folder of the checkpoints on the hosts.  [default: that of the inventory or the last bootstrap]",
)
@_on_hosts(
    "--hf-home",
    metavar="FOLDER",
    help="Hugging Face cache on the hosts.  [default: that of the inventory or the last bootstrap]",
)
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
    network: bool,
    network_floor: float | None,
    history: bool,
) -> None:
    """Show the state of every host, and where a host differs from the majority. Changes nothing.

    Without HOST and -i: all hosts that bootstrap has set up from this machine.
    """
    from mixtral_run.errors import ConfigError, HostError
    from mixtral_run.fleet.selection import hosts_of
    from mixtral_run.fleet.status.read_fleet import read_fleet, summary_rows, to_json
    from mixtral_run.terminal.report import Report

    if network_floor is not None and not network:
        raise ConfigError("--network-floor needs --network.")
    if history and (html is not None or network):
        raise ConfigError("--history is shown alone.", found="--history with --html or --network")
    if network and html is not None:
        raise ConfigError("--network has no page.", expected="--network, or --html FILE", found="both")
    chosen = hosts_of(hosts, inventory, limit)
    if history:
        _show_history(chosen, as_json)
        return
    if network:
        settings = {"checkpoints_folder": checkpoints_folder, "hf_home": hf_home, "image": image}
        _measure(chosen, settings, network_floor, as_json)
        return
    given = {"checkpoints": checkpoints_folder, "hf_home": hf_home, "image": image}
    folders = {name: value for name, value in given.items() if value}
    statuses = read_fleet(chosen, folders=folders)
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


def _show_history(hosts: Sequence[Host], as_json: bool) -> None:
    """Print the histories of hosts. Raises HostError if one cannot be read."""
    from mixtral_run.errors import HostError
    from mixtral_run.fleet.history import COLUMNS, history_rows, read_histories, to_json
    from mixtral_run.terminal.report import Report

    histories = read_histories(hosts)
    if as_json:
        click.echo(to_json(histories))
    else:
        Report().table(COLUMNS, history_rows(histories))
    bad = [each.name for each in histories if each.error is not None]
    if bad:
        raise HostError(f"The history of {len(bad)} of {len(histories)} hosts cannot be read: {', '.join(bad)}")


def _measure(hosts: Sequence[Host], given: dict[str, str | None], floor: float | None, as_json: bool) -> None:
    """Measure the network between hosts and print the figures. Raises CheckFailed for what is slow or failed."""
    from mixtral_run.errors import CheckFailed
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.network.measure import measure_pairs, rows_of
    from mixtral_run.terminal.report import Report

    options = JobOptions(**{name: value for name, value in given.items() if value})  # type: ignore[arg-type]
    results, verdict = measure_pairs(hosts, options, floor, partial(click.echo, err=True))
    if as_json:
        click.echo(json.dumps([asdict(each) for each in results], indent=2, ensure_ascii=False))
    else:
        Report().table(*rows_of(results, verdict))
    if verdict.problems:
        raise CheckFailed("The network between the hosts is not as it should be.", problems=list(verdict.problems))

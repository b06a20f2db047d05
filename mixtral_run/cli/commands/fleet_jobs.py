"""`mixtral-run jobs`, `logs`, `stop` and `fetch`: the jobs that --on and --launcher started."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mixtral_run.cli.command import Option, VerbCommand, WholeNumber
from mixtral_run.cli.completion import complete_hosts

if TYPE_CHECKING:
    from mixtral_run.errors import MixtralRunError
    from mixtral_run.fleet.jobs.jobs import JobRow
    from mixtral_run.fleet.launchers.launcher import JobState

_on_hosts = partial(click.option, cls=Option, section="Hosts")
_output = partial(click.option, cls=Option, section="Output")
_on = _on_hosts(
    "--on",
    multiple=True,
    metavar="HOST,…",
    shell_complete=complete_hosts,
    help="Hosts of the job, if another machine started it.",
)


@click.command(cls=VerbCommand, examples=("jobs --running --json", "jobs gpu-01 gpu-02"))
@click.argument("hosts", nargs=-1, shell_complete=complete_hosts, metavar="[[USER@]HOST[:PORT]]...")
@_on_hosts(
    "-i",
    "--inventory",
    type=click.Path(path_type=Path),
    help="Ansible inventory, in place of hosts on the command line.",
)
@_output("--running", is_flag=True, help="Only jobs that are running.")
@_output("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def jobs(hosts: tuple[str, ...], inventory: Path | None, running: bool, as_json: bool) -> None:
    """List the jobs on hosts, newest first. Without hosts also the jobs that --launcher gave to a scheduler."""
    from mixtral_run.fleet.launchers.scheduled_jobs import raise_errors
    from mixtral_run.terminal.report import json_document

    with json_document(as_json) as document:
        scheduled, shown, bare, errors = _all_jobs(hosts, inventory, running)
        if as_json:
            document |= {
                "ok": not errors,
                "jobs": [{**asdict(row), "host": row.host.name, "running": row.running} for row in shown],
                "scheduled": [{**asdict(each), "running": each.running} for each in scheduled],
                "hosts_without_docker": bare,
                "problems": [str(error) for error in errors],
            }
        else:
            _print_jobs(scheduled, shown, bare, nothing=not errors)
        raise_errors(errors)


def _all_jobs(
    hosts: tuple[str, ...], inventory: Path | None, running: bool
) -> tuple[list[JobState], list[JobRow], list[str], list[MixtralRunError]]:
    """Return the jobs of schedulers and of hosts, the names of hosts without Docker, and what could not be read."""
    from mixtral_run.fleet.hosts import remembered_hosts
    from mixtral_run.fleet.jobs.host_facts import NoEngineError
    from mixtral_run.fleet.jobs.jobs import list_jobs
    from mixtral_run.fleet.launchers.scheduled_jobs import scheduled_jobs
    from mixtral_run.fleet.selection import hosts_of

    named = bool(hosts) or inventory is not None
    states, problems = ([], []) if named else scheduled_jobs()
    # A site that has only a scheduler has no hosts of its own.
    only_scheduled = not named and bool(states or problems) and not remembered_hosts()
    rows, refused = ([], []) if only_scheduled else list_jobs(hosts_of(hosts, inventory, None))
    bare = [error.host.name for error in refused if isinstance(error, NoEngineError)]
    errors = [*problems, *(error for error in refused if not isinstance(error, NoEngineError))]
    shown = [row for row in rows if row.running or not running]
    scheduled = [state for state in states if state.running or not running]
    return scheduled, shown, bare, errors


def _print_jobs(scheduled: list[JobState], shown: list[JobRow], bare: list[str], *, nothing: bool) -> None:
    """Print the tables of jobs. nothing: say so if there are none."""
    from mixtral_run.terminal.report import Report

    report = Report()
    if scheduled:
        table = [
            (
                each.record.name, f"{each.record.launcher} {each.record.scheduler_id}", each.place, each.described,
                each.record.submitted.replace("T", " "), each.record.output,
            )
            for each in scheduled
        ]  # fmt: skip
        report.table(("job", "scheduler", "nodes", "state", "submitted (UTC)", "writes"), table)
    if shown:
        ends = [row.state if row.running else f"{row.state} ({row.exit_code})" for row in shown]
        columns = ("job", "host", "state", "started (UTC)", "writes")
        cells = [
            (row.job, row.host.name, end, row.since.replace("T", " "), row.output)
            for row, end in zip(shown, ends, strict=True)
        ]
        report.table(columns, cells)
    elif nothing and not scheduled:
        report.say("No jobs.")
    for name in bare:
        report.say(f"{name}: no Docker: not bootstrapped")


@click.command(
    cls=VerbCommand, examples=("logs finetune --follow", "logs finetune-1129-205700-3f2a --tail 50 --on gpu-01")
)
@click.argument("job")
@_output("-f", "--follow", is_flag=True, help="Print new lines until the job ends. Ctrl-C twice leaves it running.")
@_output("--tail", type=WholeNumber(0), metavar="LINES", help="Only the last lines.")
@_on
def logs(job: str, follow: bool, tail: int | None, on: tuple[str, ...]) -> None:
    """Show the output of a job."""
    from mixtral_run.fleet.jobs.job_log import JobFollower, show_logs
    from mixtral_run.fleet.jobs.jobs import RunningJob, find_whole_job
    from mixtral_run.fleet.launchers.scheduled_jobs import scheduled_job
    from mixtral_run.fleet.selection import hosts_of

    if scheduled := scheduled_job(job, on):
        launcher, record = scheduled
        if follow:
            launcher.follow(record, partial(click.echo, err=True))
        else:
            launcher.print_log(record, tail)
        return
    rows, errors = find_whole_job(job, hosts_of(on, None, None))
    for error in errors:
        click.echo(f"! {error}", err=True)
    if follow:
        JobFollower(RunningJob(rows[0].job, rows[0].verb, tuple(row.host for row in rows))).follow()
    else:
        show_logs(rows, tail="all" if tail is None else str(tail))


@click.command(cls=VerbCommand, examples=("stop finetune-1129-205700-3f2a", "stop finetune --on gpu-01"))
@click.argument("job")
@_on
def stop(job: str, on: tuple[str, ...]) -> None:
    """Ask a job to save and stop, and wait until it has. JOB: its name, or the start of the only running one's name."""
    from mixtral_run.fleet.jobs.stop import stop_job
    from mixtral_run.fleet.launchers.scheduled_jobs import scheduled_job
    from mixtral_run.fleet.selection import hosts_of

    if scheduled := scheduled_job(job, on):
        launcher, record = scheduled
        launcher.stop(record, click.echo)
        return
    stop_job(job, hosts_of(on, None, None), click.echo)


@click.command(
    cls=VerbCommand,
    examples=("fetch finetune-1129-205700-3f2a adapters", "fetch gpu-01:/srv/checkpoints/adapter --overwrite"),
)
@click.argument("job", metavar="JOB|HOST:PATH")
@click.argument("destination", required=False, type=click.Path(path_type=Path), default=Path())
@_output("--overwrite", is_flag=True, help="Replace a file or folder of the same name.")
@_on
@_on_hosts(
    "--checkpoints-folder",
    metavar="FOLDER",
    help="Folder of the host that is /checkpoints.  [default: that of the inventory or the last bootstrap]",
)
def fetch(job: str, destination: Path, overwrite: bool, on: tuple[str, ...], checkpoints_folder: str | None) -> None:
    """Copy the output of a job (an adapter, an export, a report) to this machine, or any file or folder of a host.

    If DESTINATION is a folder (default: the current one), the output goes into it. Otherwise it gets that name.
    """
    from mixtral_run.fleet.jobs.fetch import fetch_job
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.launchers.scheduled_jobs import fetch_scheduled, scheduled_job

    if ":/" not in job and (scheduled := scheduled_job(job, on)):
        say = partial(click.echo, err=True)
        click.echo(f"✓ {fetch_scheduled(*scheduled, destination, overwrite, say)}")
        return
    folders = JobOptions(checkpoints_folder=checkpoints_folder) if checkpoints_folder else None
    for place in fetch_job(job, destination, on, overwrite, folders, lambda text: click.echo(text, err=True)):
        click.echo(f"✓ {place}")

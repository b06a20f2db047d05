"""`mixtral-run jobs`, `logs`, `stop` and `fetch`: the jobs that --on started."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("hosts", nargs=-1, metavar="[[USER@]HOST[:PORT]]...")
@click.option("-i", "--inventory", type=click.Path(path_type=Path), help="Ansible inventory instead of hosts by name.")
@click.option("--running", is_flag=True, help="Only those that run.")
def jobs(hosts: tuple[str, ...], inventory: Path | None, running: bool) -> None:
    """List the jobs on hosts, newest first."""
    from mixtral_run.errors import HostError
    from mixtral_run.fleet.jobs.jobs import list_jobs
    from mixtral_run.fleet.selection import hosts_of
    from mixtral_run.report import Report

    rows, errors = list_jobs(hosts_of(hosts, inventory, None))
    shown = [row for row in rows if row.running or not running]
    report = Report()
    if shown:
        ends = [row.state if row.running else f"{row.state} ({row.exit_code})" for row in shown]
        columns = ("job", "host", "state", "started (UTC)", "writes")
        cells = [
            (row.job, row.host.name, end, row.since.replace("T", " "), row.output)
            for row, end in zip(shown, ends, strict=True)
        ]
        report.table(columns, cells)
    elif not errors:
        report.say("No jobs.")
    if errors:
        raise HostError("Not every host tells of its jobs.", problems=[str(error) for error in errors])


@click.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends; Ctrl-C twice leaves it running.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines.")
@click.option("--on", multiple=True, metavar="HOST,…", help="Where it runs, if it was started from another machine.")
def logs(job: str, follow: bool, tail: int | None, on: tuple[str, ...]) -> None:
    """Show what a job printed."""
    from mixtral_run.fleet.jobs.job_log import JobFollower, show_logs
    from mixtral_run.fleet.jobs.jobs import RunningJob, find_whole_job
    from mixtral_run.fleet.selection import hosts_of

    rows, errors = find_whole_job(job, hosts_of(on, None, None))
    for error in errors:
        click.echo(f"! {error}", err=True)
    if follow:
        JobFollower(RunningJob(rows[0].job, rows[0].verb, tuple(row.host for row in rows))).follow()
    else:
        show_logs(rows, tail="all" if tail is None else str(tail))


@click.command()
@click.argument("job")
@click.option("--on", multiple=True, metavar="HOST,…", help="Where it runs, if it was started from another machine.")
def stop(job: str, on: tuple[str, ...]) -> None:
    """Ask a job to save and end, and wait until it has. JOB: its name, or the start of the only one that runs."""
    from mixtral_run.fleet.jobs.stop import stop_job
    from mixtral_run.fleet.selection import hosts_of

    stop_job(job, hosts_of(on, None, None), click.echo)


@click.command()
@click.argument("job", metavar="JOB|HOST:PATH")
@click.argument("destination", required=False, type=click.Path(path_type=Path), default=Path())
@click.option("--overwrite", is_flag=True, help="Replace the file or folder of that name.")
@click.option(
    "--on", multiple=True, metavar="HOST,…", help="Where the job ran, if it was started from another machine."
)
@click.option("--checkpoints-folder", metavar="FOLDER", help="The host's /checkpoints, if not at the default.")
def fetch(job: str, destination: Path, overwrite: bool, on: tuple[str, ...], checkpoints_folder: str | None) -> None:
    """Bring here what a job wrote (an adapter, an export, a report), or any file or folder of a host.

    It goes into DESTINATION where that is a folder (default: the current one), else under that name.
    """
    from mixtral_run.fleet.jobs.fetch import fetch_job
    from mixtral_run.fleet.jobs.job_spec import JobOptions

    folders = JobOptions(checkpoints_folder=checkpoints_folder) if checkpoints_folder else None
    for place in fetch_job(job, destination, on, overwrite, folders, lambda text: click.echo(text, err=True)):
        click.echo(f"✓ {place}")

"""`mixtral-run runs`."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click

from mixtral_run.cli.command import Option, VerbCommand
from mixtral_run.errors import ConfigError, HostError

_on_hosts = partial(click.option, cls=Option, section="Hosts")
_output = partial(click.option, cls=Option, section="Output")
_comparison = partial(click.option, cls=Option, section="Comparison")


@click.command(
    cls=VerbCommand,
    examples=("runs adapters --best", "runs --compare adapters/a adapters/b --plot a-b.html"),
)
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@_on_hosts("--on", multiple=True, metavar="HOST,…", help="List the runs on these hosts.")
@_on_hosts(
    "--checkpoints-folder",
    metavar="PATH",
    help="With --on: folder of the host to which FOLDER is relative.  [default: as for status]",
)
@_output("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@_comparison("--best", is_flag=True, help="Only the run with the lowest validation loss.")
@_comparison("--compare", nargs=2, metavar="A B", help="Show what differs between two runs, given by their folders.")
@_comparison(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --compare: write the curves of both as .html or .png.",
)
def runs(
    folders: tuple[str, ...],
    on: tuple[str, ...],
    checkpoints_folder: str | None,
    as_json: bool,
    best: bool,
    compare: tuple[str, str] | None,
    plot: Path | None,
) -> None:
    """List the runs that finetune has written, the newest first. FOLDER: of runs, or a run itself; default: here."""
    from mixtral_run.terminal.report import json_document

    with json_document(as_json) as document:
        _check(folders, on, best, compare, plot)
        _check_folder(on, checkpoints_folder)
        if compare:
            document |= _compare(compare, plot, silent=as_json)
            return
        rows, problems = _rows(folders, on, checkpoints_folder)
        remarks: list[str] = []
        if best and (rows or not problems):
            from mixtral_run.results.run_table import best_run

            row, remarks = best_run(rows)
            rows = [dict(row)]
        document |= {"ok": True, "runs": rows, "problems": problems, "remarks": remarks}
        if not as_json:
            _print(rows, problems, remarks, best=best, with_hosts=bool(on))
        if problems and (on or not rows):
            error = HostError if on else ConfigError
            raise error("Some places could not be read.", problems=problems)


def _check(
    folders: tuple[str, ...], on: tuple[str, ...], best: bool, compare: tuple[str, str] | None, plot: Path | None
) -> None:
    """Raise ConfigError with all options that do not go together."""
    from mixtral_run.results.compare import SUFFIXES

    problems = []
    if compare and (on or folders or best):
        given = [name for name, there in (("--on", on), ("FOLDER", folders), ("--best", best)) if there]
        problems.append(f"--compare: expected two folders of this machine only; found {', '.join(given)} as well")
    if plot is not None and not compare:
        problems.append("--plot: expected --compare A B with it; found none")
    if plot is not None and plot.suffix not in SUFFIXES:
        problems.append(f"--plot: expected a file that ends in {' or '.join(SUFFIXES)}; found {plot}")
    if problems:
        raise ConfigError("Some settings are wrong.", problems=problems)


def _check_folder(on: tuple[str, ...], checkpoints_folder: str | None) -> None:
    if checkpoints_folder is not None and (not on or not checkpoints_folder.startswith("/")):
        raise ConfigError(
            "--checkpoints-folder is a folder of hosts.",
            expected="--on HOST, and an absolute path",
            found=checkpoints_folder,
        )


def _rows(
    folders: tuple[str, ...], on: tuple[str, ...], checkpoints_folder: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    if not on:
        from mixtral_run.results.run_list import find_runs

        found = find_runs(list(folders) or ["."])
        return found["runs"], found["problems"]
    from mixtral_run.fleet.selection import hosts_of
    from mixtral_run.fleet.status.read_runs import runs_on

    hosts = tuple(name for each in on for name in each.split(",") if name)
    return runs_on(hosts_of(hosts, None, None), folders, checkpoints_folder)


def _print(rows: list[Any], problems: list[str], remarks: list[str], *, best: bool, with_hosts: bool) -> None:
    from mixtral_run.results.run_table import (
        COLUMNS,
        NARROW_COLUMNS,
        best_checkpoint,
        cells,
        narrow_cells,
        printable,
        words_for_best,
    )
    from mixtral_run.terminal.report import Report

    report = Report()
    if rows:
        host = ("host",) if with_hosts else ()
        hosts = [(printable(row["host"]),) if with_hosts else () for row in rows]
        narrow = [(*host, *narrow_cells(row)) for host, row in zip(hosts, rows, strict=True)]
        wide = [(*host, *cells(row)) for host, row in zip(hosts, rows, strict=True)]
        report.table((*host, *COLUMNS), wide, narrow=((*host, *NARROW_COLUMNS), narrow))
    elif not problems:
        report.say("No runs.")
    for row in rows:
        for each in row["problems"]:
            report.warn(printable(f"{row['folder']}: {each}"))
    for each in (*remarks, *(printable(problem) for problem in problems if not with_hosts and rows)):
        report.warn(each)
    if best and rows and not with_hosts:
        adapter, remark = best_checkpoint(rows[0])
        if remark:
            report.warn(remark)
        report.say(f"  next: mixtral-run {words_for_best(rows[0])} {shlex.quote(printable(adapter))} --output-path …")


def _compare(folders: tuple[str, str], plot: Path | None, *, silent: bool) -> dict[str, Any]:
    """Print what differs between two runs unless `silent`, write the plot, and return the comparison."""
    from mixtral_run.results.compare import write_comparison
    from mixtral_run.results.read_run import read_run
    from mixtral_run.results.run_list import row_of
    from mixtral_run.results.run_table import differences
    from mixtral_run.terminal.report import Report

    found = [row_of(Path(each)) for each in folders]
    missing = [f"{folder}: no run" for folder, row in zip(folders, found, strict=True) if row is None]
    rows = [row for row in found if row is not None]
    if missing:
        raise ConfigError("There are no two runs to compare.", problems=missing, next_command="mixtral-run runs")
    different = differences(*rows)
    names = [row["name"] for row in rows]
    if names[0] == names[1]:
        names = list(folders)
    if plot is not None:
        write_comparison(plot, [read_run(Path(each)) for each in folders], names, different)
    if not silent:
        report = Report()
        report.table(("", *names), different)
        if plot is not None:
            report.done(f"The curves are in {plot}")
    return {"ok": True, "runs": rows, "differences": different}

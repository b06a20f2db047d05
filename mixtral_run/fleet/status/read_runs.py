"""The runs on hosts: the same list as on this machine, made there by a program over SSH."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtral_run.errors import HostError
from mixtral_run.fleet.host_folders import folders_of
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.ssh.problems import connection_problem, last_line
from mixtral_run.fleet.status.payload import program_of
from mixtral_run.fleet.status.read_fleet import TIMEOUT_SECONDS
from mixtral_run.fleet.untrusted import parse_json
from mixtral_run.results import read_run, run_list

_PROGRAM = """
import json, sys
from mixtral_run.results.run_list import find_runs
print(json.dumps(find_runs(json.loads(sys.argv[1]))))
"""
_SCRIPT = (
    "p=$(command -v python3) || exit 127; "
    'if sudo -n true 2>/dev/null; then exec sudo -n "$p" - "$1"; fi; exec "$p" - "$1"'
)
_KINDS: dict[str, type | tuple[type, ...]] = {
    "folder": str, "name": str, "state": str, "started": (str, type(None)), "iteration": int,
    "train_iters": (int, type(None)), "best_iteration": (int, type(None)), "settings": dict, "problems": list,
}  # fmt: skip


def runs_program() -> bytes:
    """Return the program for `python3 -`. It needs Python 3.8 and installs nothing."""
    modules = {
        module.__name__: Path(str(module.__file__)).read_text(encoding="utf-8") for module in (read_run, run_list)
    }
    return program_of({"mixtral_run": "", "mixtral_run.results": "", **modules}, _PROGRAM)


def runs_on(
    hosts: Sequence[Host], folders: Sequence[str], checkpoints_folder: str | None = None, ssh: Ssh | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of all hosts, each with its host, and a line for each host or folder that cannot be read.

    folders: paths of the hosts; relative ones are below the checkpoints folder, which is the default.
    """
    ssh = ssh or Ssh()
    program = runs_program()

    def argument(host: Host) -> str:
        top = folders_of(host, checkpoints_folder).checkpoints
        return json.dumps([posixpath.join(top, each) for each in folders] or [top])

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for host, (found, wrong) in zip(
        hosts, ssh.each(hosts, lambda host: _runs_of(ssh, host, program, argument(host))), strict=True
    ):
        rows += [{**row, "host": host.name} for row in found]
        problems += [f"{host.name}: {each}" for each in wrong]
    return rows, problems


def _runs_of(ssh: Ssh, host: Host, program: bytes, argument: str) -> tuple[list[dict[str, Any]], list[str]]:
    command = ["sh", "-c", _SCRIPT, "runs", argument]
    try:
        answer = ssh.run(host, command, stdin=program, timeout_seconds=TIMEOUT_SECONDS)
    except HostError as error:
        return [], [str(error)]
    if answer.exit_code == 255:
        return [], [connection_problem(host, answer.errors)]
    if answer.exit_code:
        return [], [f"its runs cannot be read: {last_line(answer.errors) or f'exit code {answer.exit_code}'}"]
    try:
        return rows_of(parse_json(answer.output))
    except ValueError as error:
        return [], [f"its answer is not in the expected form: {error}"]


def rows_of(values: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows and problems of a host's answer. A row of another form is a problem. Raises ValueError."""
    if not isinstance(values, dict) or not isinstance(values.get("runs"), list):
        raise ValueError("no list of runs")
    rows = [row for row in values["runs"] if isinstance(row, dict) and _is_row(row)]
    problems = [str(each)[:500] for each in values.get("problems") or () if isinstance(each, str)]
    if len(rows) < len(values["runs"]):
        problems.append(f"{len(values['runs']) - len(rows)} of its runs are not in the expected form")
    return rows, problems


def _is_row(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(name), kind) and not isinstance(row.get(name), bool) for name, kind in _KINDS.items())

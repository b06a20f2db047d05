"""`mixtral-run stop`: ask a job to save and end, and report the result on each host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.jobs import KILLED, SIGNALLED, JobRow, find_whole_job, stop
from mixtral_run.fleet.ssh.connection import Ssh


def stop_job(name: str, hosts: Sequence[Host], say: Callable[[str], None], ssh: Ssh | None = None) -> None:
    """Stop a job on all its hosts and report its end on each.

    Raises HostError if a container was killed, failed while it ended, or runs on a host that does not answer.
    """
    rows, unasked = find_whole_job(name, hosts, ssh, prefer_running=True)
    job, problems = rows[0].job, []
    if any(row.running for row in rows):
        say(f"Asking {job} to save and end …")
        for row in stop(rows, ssh):
            problem = _problem(row)
            if problem:
                problems.append(problem)
            else:
                say(f"✓ {job} has ended on {row.host.name} (exit code {row.exit_code})")
    elif not unasked:
        say(f"{job} has already ended.")
    if unasked:
        raise HostError(
            f"{job} may still run: not all its hosts answer.",
            expected=f"{rows[0].num_hosts} hosts",
            found=f"{len(rows)}",
            problems=[*problems, *map(str, unasked)],
            next_command=f"mixtral-run stop {job}",
        )
    if problems:
        raise HostError(f"{job} has ended, but not cleanly.", problems=problems, next_command=f"mixtral-run logs {job}")


def _problem(row: JobRow) -> str | None:
    if row.exit_code in (0, *SIGNALLED):
        return None
    if row.exit_code == KILLED:
        return f"{row.host.name}: it did not end in time and was killed; unsaved work is lost"
    return f"{row.host.name}: exit code {row.exit_code}; its output shows whether it saved"

"""What `fetch` means by its argument: a job's output, or a path on a host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import Host, find_hosts, remembered_hosts
from mixtral_run.fleet.jobs.job_spec import JobOptions, host_path
from mixtral_run.fleet.jobs.jobs import fetch, find_job
from mixtral_run.fleet.selection import hosts_of


def fetch_job(
    what: str,
    destination: Path,
    on: Sequence[str] = (),
    overwrite: bool = False,
    folders: JobOptions | None = None,
) -> list[Path]:
    """Bring a job's output or `HOST:PATH` here; returns where it lies. Raises ConfigError for what writes nothing.

    PATH is one of the host, or below /checkpoints and /huggingface one of the container, which `folders` has on the
    host. Like `cp`: into `destination` where that is a folder, else under that name.
    """
    host_word, colon, path = what.partition(":/")
    if colon:
        (host,) = find_hosts([host_word], remembered_hosts())
        return [_fetch(host, host_path("/" + path, folders or JobOptions()), destination, overwrite)]
    rows = find_job(what, hosts_of(tuple(on), None, None))
    if rows[0].running:
        raise ConfigError(f"{rows[0].job} is still running.", next_command=f"mixtral-run logs -f {rows[0].job}")
    if not rows[0].output:
        raise ConfigError(f"{rows[0].job} writes no files ({rows[0].verb}).")
    return [_fetch(rows[0].host, rows[0].output, destination, overwrite)]


def _fetch(host: Host, path: str, destination: Path, overwrite: bool) -> Path:
    target = destination / PurePosixPath(path).name if destination.is_dir() else destination
    return fetch(host, path, target, overwrite=overwrite)

"""Run of a verb on hosts (`--on`): start, live output, start again, next command."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from mixtral_run.config.fields import Config
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.names.store_names import store_url
from mixtral_run.config.verbs.training import can_resume
from mixtral_run.errors import INCURABLE, ConfigError, MixtralRunError, Stopped
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.job_log import JobFollower
from mixtral_run.fleet.jobs.job_spec import OUTPUTS, JobOptions, host_path
from mixtral_run.fleet.jobs.jobs import RunningJob
from mixtral_run.fleet.jobs.lost_hosts import HostLost
from mixtral_run.fleet.jobs.queue import ANY, start_when_free
from mixtral_run.fleet.selection import hosts_of

SHORTEST_SECONDS, LONGEST_SECONDS = 5.0, 300.0
"""Time before the second attempt of a job on several hosts, and before any later one."""
ENDING = "2m"
"""Value of --wait for a further attempt."""


def run_on_hosts(verb: str, config: Config, options: JobOptions) -> RunningJob:
    """Run a verb on hosts and print its output until it ends; with `detach`, only start it.

    A job on several hosts starts again as a whole, up to `max_restarts` times; and, with `min_hosts`, without the hosts
    that are lost. On one host the container's restart policy does that, also while nobody follows the job.

    Raises the error class that belongs to the job's exit code, or Left if the user left the running job.
    """
    hosts = () if options.on == (ANY,) else hosts_of(options.on, options.inventory, None)
    num_hosts = len(hosts) or 1
    if num_hosts > 1 and not isinstance(config, LaunchConfig):
        raise ConfigError(f"{verb} runs on one host.", found=f"--on {','.join(host.name for host in hosts)}")
    _check(options, num_hosts)
    restarts = 0
    while True:
        job = start_when_free(verb, config, options, _say)
        names = ", ".join(host.name for host in job.hosts)
        _say(f"{job.name} runs on {names}. It continues if you leave (Ctrl-C twice)")
        _say(f"  to stop it: mixtral-run stop {job.name}")
        if options.detach:
            _say(f"output: mixtral-run logs -f {job.name}")
            return job
        try:
            JobFollower(job, say=_say).follow()
            break
        except MixtralRunError as error:
            left = _hosts_left(job, options, error)
            if left is None or (not isinstance(error, HostLost) and restarts >= (options.max_restarts or 0)):
                raise
            restarts += not isinstance(error, HostLost)
            seconds = min(LONGEST_SECONDS, SHORTEST_SECONDS * 2 ** max(restarts - 1, 0))
            _say(f"✗ {error.what} Starting again on {', '.join(left)} in {seconds:.0f} s")
            time.sleep(seconds)
            # Containers of this attempt may still be ending.
            wait = None if options.share else options.wait or ENDING
            options = dataclasses.replace(options, on=left, wait=wait)
            config = _resuming(config)
    _say(f"✓ {job.name} is done")
    _say_output(job, config, options)
    return job


def _check(options: JobOptions, num_hosts: int) -> None:
    """Raise ConfigError for settings about starting again that these hosts cannot fulfil."""
    problems = []
    if options.min_hosts is not None and not 1 <= options.min_hosts < num_hosts:
        problems.append(f"--min-hosts: expected fewer than the {num_hosts} of --on; found {options.min_hosts}")
    if options.max_restarts and options.detach and num_hosts > 1:
        problems.append(
            "--max-restarts: expected no --detach with several hosts, as this command starts the job again; found both"
        )
    if problems:
        raise ConfigError("The job cannot be started again as asked.", problems=problems)


def _resuming(config: Config) -> Config:
    """Return the config of a verb for another attempt."""
    changed: dict[str, Any] = {"resume": "auto"} if can_resume(config.to_mapping()) else {}
    return dataclasses.replace(config, **changed)


def _hosts_left(job: RunningJob, options: JobOptions, error: MixtralRunError) -> tuple[str, ...] | None:
    """Return the hosts to start a job again on; None if starting again cannot help, or is left to the engine."""
    if isinstance(error, HostLost):
        left = tuple(_word(host, options) for host in job.hosts if host != error.host)
        enough = options.min_hosts is not None and len(left) >= options.min_hosts
        return left if enough else None
    if len(job.hosts) == 1 or isinstance(error, Stopped) or error.exit_code in INCURABLE:
        return None
    return tuple(_word(host, options) for host in job.hosts)


def _word(host: Host, options: JobOptions) -> str:
    """Return the word of --on for a host."""
    return host.target if options.inventory is None else host.name


def _say(text: str) -> None:
    # Standard output is the job's output only: `generate --json --on HOST | jq` works.
    print(text, file=sys.stderr, flush=True)


def _say_output(job: RunningJob, config: Config, options: JobOptions) -> None:
    output = next((str(path) for name in OUTPUTS if (path := getattr(config, name, None))), None)
    if output and store_url(output):
        _say(f"  output: {store_url(output)}")
    elif output:
        place = output if output.startswith("/") else host_path(f"/checkpoints/{output}", options.folders(job.hosts[0]))
        _say(f"  output: {place}; to copy it here: mixtral-run fetch {job.name}")

"""The queue of plain hosts: start a job on a free host, or wait until one is free."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from mixtral_run.config.fields import Config
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import RunningJob, list_jobs, start
from mixtral_run.fleet.jobs.taking import GPU_VERBS, BusyError, OutputTakenError, busy_error, needs_free_host
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Ssh

ANY = "any"
"""`--on any`: one free host of the fleet."""
LOOK_SECONDS = 30.0
Say = Callable[[str], None]
T = TypeVar("T")


def wait_seconds(text: str | None) -> float:
    """Return the longest time to wait: 0 without --wait, infinity for `forever`. `JobOptions.check` knows the form."""
    if text is None or text == "forever":
        return 0.0 if text is None else float("inf")
    found = re.fullmatch(r"(\d+)([smhd]?)", text)
    assert found is not None, "JobOptions.check accepts no other form"
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def start_when_free(verb: str, config: Config, options: JobOptions, say: Say, ssh: Ssh | None = None) -> RunningJob:
    """Start a verb as `start` does, on a free host with `--on any`. With `--wait` wait until that is possible.

    There is no order among those who wait.
    """
    ssh = ssh or Ssh()
    return when_free(verb, options, say, ssh, lambda hosts: start(verb, config, options, ssh, hosts=hosts))


def when_free(verb: str, options: JobOptions, say: Say, ssh: Ssh, attempt: Callable[[tuple[Host, ...]], T]) -> T:
    """Return the result of `attempt`, which starts a verb on hosts, or on those of options.on if it is given none.

    With `--on any` it is tried on one host after the other. With `--wait` it is repeated as long as it raises
    BusyError.
    """
    options.check()
    _refuse_any_among_others(options)
    until, said = time.monotonic() + wait_seconds(options.wait), ""
    while True:
        try:
            if options.on == (ANY,):
                return _on_any(verb, options, ssh, say, attempt)
            return attempt(())
        except BusyError as error:
            left = until - time.monotonic()
            if left <= 0:
                raise
            text = "; ".join(error.problems)
            if text != said:
                say(f"waiting for a free host: {text}")
            said = text
            # Spread in time: others who wait would look at the same moment.
            time.sleep(min(left, LOOK_SECONDS * random.uniform(0.75, 1.25)))


def _on_any(verb: str, options: JobOptions, ssh: Ssh, say: Say, attempt: Callable[[tuple[Host, ...]], T]) -> T:
    """Return the result of `attempt` on the first host that takes the job.

    Raises BusyError if hosts are busy and no other host can run it; HostError if no host can run it at all.
    """
    hosts, busy, problems = hosts_of((), options.inventory, None), {}, []
    if needs_free_host(verb, share=options.share):
        # Hosts that do not answer are left to `start`.
        running = [row for row in list_jobs(hosts, ssh)[0] if row.running and row.verb in GPU_VERBS]
        busy = {row.host.name: row.job for row in running}
    for host in hosts:
        if host.name in busy:
            continue
        try:
            result = attempt((host,))
        except BusyError as error:
            # Another operator was faster.
            busy |= dict(error.jobs)
        except (HostError, OutputTakenError) as error:
            problems.append(f"{host.name}: {error.what}")
        else:
            for problem in problems:
                say(f"! {problem}")
            return result
    if busy:
        raise busy_error(list(busy.items()), problems)
    raise HostError("No host can run the job.", problems=problems, next_command="mixtral-run status")


def _refuse_any_among_others(options: JobOptions) -> None:
    """Raise ConfigError if `any` is one of several hosts."""
    words = [piece for word in options.on for piece in word.split(",") if piece]
    if ANY in words and words != [ANY]:
        raise ConfigError(
            "--on any is one free host of all.", found=f"--on {','.join(words)}", expected="--on any alone"
        )

"""The queue of plain hosts: start a job on a free host, or wait until one is free."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from mixtral_run.config.fields import Config
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.job_spec import HostFacts, JobOptions
from mixtral_run.fleet.jobs.jobs import RunningJob, facts_of, list_jobs, start
from mixtral_run.fleet.jobs.taking import BusyError, busy_error, needs_free_host
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Ssh

ANY = "any"
"""`--on any`: one free host of the fleet."""
LOOK_SECONDS = 30.0
Say = Callable[[str], None]
Found = TypeVar("Found")


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
    options.check()
    _refuse_any_among_others(options)

    def attempt() -> RunningJob:
        if options.on == (ANY,):
            return _start_on_any(verb, config, options, ssh, say)
        return start(verb, config, options, ssh)

    return _patiently(attempt, options, say)


def free_host(
    verb: str, options: JobOptions, say: Say, ssh: Ssh, *, needs_image: bool = True
) -> tuple[Host, HostFacts]:
    """Return the host of --on, and its facts, for a verb that runs on one host; a free one with `--on any`.

    With `--wait` wait until it is free. Raises ConfigError for several hosts, HostError if none can run the verb, and
    BusyError if those that could are busy.
    """
    options.check()
    _refuse_any_among_others(options)
    is_any = options.on == (ANY,)
    hosts = hosts_of(() if is_any else options.on, options.inventory, None)
    if len(hosts) != 1 and not is_any:
        raise ConfigError(f"{verb} runs on one host.", found=f"--on {','.join(host.name for host in hosts)}")

    def attempt() -> tuple[Host, HostFacts]:
        busy, problems = _busy(verb, hosts, options, ssh), []
        for host in hosts:
            if host.name in busy:
                continue
            try:
                (facts,) = facts_of([host], options, ssh, needs_image=needs_image)
            except HostError as error:
                if not is_any:
                    raise
                problems.append(f"{host.name}: {error.what}")
            else:
                return host, facts
        if busy:
            raise busy_error(list(busy.items()), problems)
        raise HostError("No host can run this.", problems=problems, next_command="mixtral-run status")

    return _patiently(attempt, options, say)


def _busy(verb: str, hosts: Sequence[Host], options: JobOptions, ssh: Ssh) -> dict[str, str]:
    """Return the job on each host that a verb must not start next to. Hosts that do not answer are left out."""
    if not needs_free_host(verb, share=options.share):
        return {}
    rows = [row for row in list_jobs(hosts, ssh)[0] if row.running and needs_free_host(row.verb, share=False)]
    return {row.host.name: row.job for row in rows}


def _patiently(attempt: Callable[[], Found], options: JobOptions, say: Say) -> Found:
    """Return what an attempt returns. With --wait, try again as long as it raises BusyError."""
    until, said = time.monotonic() + wait_seconds(options.wait), ""
    while True:
        try:
            return attempt()
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


def _start_on_any(verb: str, config: Config, options: JobOptions, ssh: Ssh, say: Say) -> RunningJob:
    """Start a job on the first host that takes it.

    Raises BusyError if hosts are busy and no other host can run it; HostError if no host can run it at all.
    """
    hosts, problems = hosts_of((), options.inventory, None), []
    # Hosts that do not answer are left to `start`.
    busy = _busy(verb, hosts, options, ssh)
    for host in hosts:
        if host.name in busy:
            continue
        try:
            job = start(verb, config, options, ssh, hosts=(host,))
        except BusyError as error:
            # Another operator was faster.
            busy |= dict(error.jobs)
        except HostError as error:
            problems.append(f"{host.name}: {error.what}")
        else:
            for problem in problems:
                say(f"! {problem}")
            return job
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

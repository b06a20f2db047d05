"""Verbs that run in several processes: start them, or be one of them."""

from __future__ import annotations

from collections.abc import Callable

from mixtral_run.config.verbs import LaunchConfig


def run_job(verb: str, config: LaunchConfig, job: Callable[[], None], check: Callable[[int], None]) -> None:
    """Check, then call `job` in each process of the job; where torchrun has not started them, start them.

    `check` gets the number of processes and raises what a person must mend first.
    """
    from mixtral_run.launch import processes

    check(processes.process_count(config))
    if processes.is_worker():
        job()
    else:
        processes.torchrun(verb, config)

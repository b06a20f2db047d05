"""Verbs that run in several processes: start them, or be one of them."""

from __future__ import annotations

from collections.abc import Callable

from mixtral_run.config import LaunchConfig


def run_job(verb: str, config: LaunchConfig, job: Callable[[], None], check: Callable[[int], None]) -> None:
    """Check, then call `job` in each process of the job; where torchrun has not started them, start them.

    `check` gets the number of processes and raises what a person must mend first.
    """
    from mixtral_run import launch

    check(launch.process_count(config))
    if launch.is_worker():
        job()
    else:
        launch.torchrun(verb, config)

"""The one way to run a job: settle the config once, start the processes, and call one function in each of them.

The parent sends every process the name of the function and the config as JSON. Under a torchrun that the user started,
each process comes through the command line, settles its config the same way and calls the same function.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.errors import MixtralRunError, from_os_error
from mixtral_run.launch import processes
from mixtral_run.launch.heartbeat import DIRECTORY_VARIABLE, start_heartbeat
from mixtral_run.launch.parent_death import JOB_PARENT, end_with_parent, watch_parent
from mixtral_run.launch.process_exit import INTERRUPTED, exit_silently
from mixtral_run.launch.worker_errors import ERROR_DIRECTORY_VARIABLE, hand_over_error, is_consequence, leave_quietly
from mixtral_run.run_lock import report_loss_with
from mixtral_run.terminal.report import debugging, quiet_libraries

ConfigT = TypeVar("ConfigT", bound=LaunchConfig)


@dataclass(frozen=True)
class Job:
    """Work of every process of a job: a function that takes the config and that all ranks call.

    entry_point: `package.module:function`. The function has a name instead of a reference so that the parent does not
        import its module.
    preload: Modules that the fork server imports before it forks the processes.
    """

    entry_point: str
    preload: tuple[str, ...] = ()

    def import_ahead(self) -> None:
        """Start the imports in the background. Call this before the parent imports torch."""
        processes.import_ahead(self.preload)

    def __call__(self, config: LaunchConfig) -> None:
        """Call the function with `config` in this process."""
        _resolve(self.entry_point)(config)


def run_job(job: Job, config: ConfigT, check: Callable[[ConfigT, int], object] | None = None) -> None:
    """Call `job` with `config` in every process of the job, and wait for the end.

    If torchrun started this process, only call the job here. Otherwise start the processes on this machine.

    Args:
        config: The settled config. The processes get it as it is; none of them asks the planner or checks it again.
        check: Called with the config and the world size before a process is started; raises if the job cannot run.

    Raises:
        MixtralRunError: From `check`, from `num_processes`, or from a process of the job.
        KeyboardInterrupt: The job was interrupted before a process could stop on request.
    """
    if check is not None:
        check(config, processes.process_count(config))
    if processes.is_worker():
        watch_parent()
        if DIRECTORY_VARIABLE in os.environ:
            start_heartbeat(Path(os.environ[DIRECTORY_VARIABLE]), processes.rank(), config.distributed_timeout_minutes)
        job(config)
        return
    count = processes.num_processes(config)
    job.import_ahead()
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // count))
    config_class = f"{type(config).__module__}:{type(config).__qualname__}"
    environment = processes.changed_environment()
    processes.start_processes(count, _work, job.entry_point, config_class, config.to_json(), threads, environment)


def _resolve(name: str) -> Any:
    """Return the object that `package.module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _work(
    error_directory: str,
    entry_point: str,
    config_class: str,
    config_json: str,
    threads: int,
    environment: dict[str, str],
) -> None:
    """Run the job in one of its processes, and hand its error over to the parent."""
    import torch

    from mixtral_run.launch.stop_request import StopRequest
    from mixtral_run.model.parallel.mesh import end_with_the_job

    end_with_parent(JOB_PARENT)
    end_with_the_job()
    os.environ[ERROR_DIRECTORY_VARIABLE] = error_directory
    report_loss_with(hand_over_error)
    os.environ.update(environment)
    torch.set_num_threads(threads)
    quiet_libraries()
    try:
        config = _resolve(config_class).from_json(config_json)
        start_heartbeat(Path(error_directory), processes.rank(), config.distributed_timeout_minutes)
        Job(entry_point)(config)
    except KeyboardInterrupt:
        # Ctrl-C reaches the parent as well, which reports it once for all processes.
        exit_silently(INTERRUPTED)
    except Exception as error:
        _end_failed(error)
    if StopRequest.ended_a_run:
        sys.exit(processes.STOPPED)


def _end_failed(error: Exception) -> NoReturn:
    """End this process after an error: hand it over if the user can act on it, else print the traceback."""
    known = error if isinstance(error, MixtralRunError) else None
    if isinstance(error, OSError):
        known = from_os_error(error)
    if known is not None:
        if debugging():
            traceback.print_exception(error)
        hand_over_error(known)
        sys.exit(known.exit_code)
    if isinstance(error, RuntimeError) and not debugging() and is_consequence(error):
        leave_quietly()
    # torch would pass the exception to the parent, and this process would print nothing.
    traceback.print_exception(error)
    sys.exit(1)

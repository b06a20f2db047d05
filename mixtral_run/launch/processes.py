"""Processes of a job: how many there are, and how torchrun starts them from a fork server.

Importing torch and Megatron in eight processes takes more than ten seconds on a GPU host. Therefore one process imports
them (Python's fork server), while the parent still checks the config, and the processes of the job are forked from it.
Under a torchrun that the user started, nothing is started here.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

from mixtral_run.config.fields import flag_of
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.errors import ConfigError
from mixtral_run.launch.hang_watch import watching
from mixtral_run.launch.heartbeat import DIRECTORY_VARIABLE
from mixtral_run.launch.parent_death import FORK_SERVER_PARENT
from mixtral_run.launch.process_exit import StopOnce
from mixtral_run.launch.terminal import is_lent
from mixtral_run.launch.worker_errors import collect_error

SHUTDOWN_SECONDS = 300
"""Time that the processes have to save after a stop request, before they are killed."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a process of ours that stopped on request. A process that ends with 0 waits until torchrun has read its
result, and torchrun does not read any more after a signal."""
PRELOAD_VARIABLE = "MIXTRAL_RUN_PRELOAD"
"""Environment variable of the fork server: modules to import, separated by commas."""


def is_worker() -> bool:
    """Return True if torchrun started this process, ours or the user's."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return the rank of this process; 0 outside a job."""
    return int(os.environ.get("RANK", "0"))


def default_num_processes(device: str) -> int:
    """Return the number of GPUs, or 2 on CPU. Raise ConfigError for `cuda` without a GPU."""
    import torch

    if device == "cpu":
        return 2
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if device == "cuda":
        raise ConfigError(
            "There is no GPU that torch can use.",
            expected="--device cuda needs a CUDA build of torch and a visible GPU",
            found=f"torch {torch.__version__}, 0 GPUs",
            next_command="nvidia-smi; or --device cpu",
        )
    return 2


def process_count(config: LaunchConfig) -> int:
    """Return the world size of the job, without a check of the layout."""
    if is_worker():
        return int(os.environ["WORLD_SIZE"])
    return config.nproc_per_node or default_num_processes(config.device)


def host_process_count(count: int) -> int:
    """Return how many of a job's `count` processes run on this host: all, unless the user's torchrun spread them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count)) if is_worker() else count


def num_processes(config: LaunchConfig) -> int:
    """Return the world size of the job. Raise ConfigError if the layout does not divide it."""
    count = process_count(config)
    problems = config.world_size_problems(count)
    if problems:
        tp, cp = config.tensor_model_parallel_size, config.context_size
        given = {
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp if cp > 1 else None,
            "expert_model_parallel_size": config.expert_model_parallel_size,
        }
        sizes = {name: size for name, size in given.items() if size is not None}
        fitting = {name: math.gcd(size, count) for name, size in sizes.items()}
        if cp > 1:
            # TP and CP split the same rows: their product has to divide the processes.
            fitting["context_parallel_size"] = math.gcd(cp, count // fitting.get("tensor_model_parallel_size", 1))
        smaller = " ".join(f"{flag_of(name)} {size}" for name, size in fitting.items())
        least = math.lcm((tp or 1) * cp, config.expert_model_parallel_size or 1)
        letters = "/".join(f"{name[0].upper()}P{size}" for name, size in sizes.items())
        more = _more_processes(config, least, count)
        raise ConfigError(
            f"The layout {letters} does not fit {count} process{'es' if count != 1 else ''}.",
            problems=problems,
            next_command=f"{more}, or {smaller}" if more else smaller,
        )
    return count


def _more_processes(config: LaunchConfig, least: int, count: int) -> str | None:
    """Return the flag that starts `least` processes in place of `count`, or None if these machines cannot."""
    if not is_worker():
        return f"{flag_of('nproc_per_node')} {least}" if _can_start(config, least) else None
    hosts = max(count // host_process_count(count), 1)
    on_each = math.ceil(least / hosts)
    fits = on_each * hosts % least == 0 and _can_start(config, on_each)
    # A job of --on on several hosts runs under the kit's own torchrun, and has the kit's flag.
    ours = DIRECTORY_VARIABLE in os.environ
    flag = f"{flag_of('nproc_per_node')} {on_each}" if ours else f"torchrun --nproc_per_node {on_each} …"
    return flag if fits else None


def _can_start(config: LaunchConfig, count: int) -> bool:
    """Return True if this machine can run `count` processes (one GPU each, or any number on CPU)."""
    import torch

    return config.device == "cpu" or not torch.cuda.is_available() or torch.cuda.device_count() >= count


_fork_server_environment: dict[str, str] = {}
"""Environment of the fork server, which every forked process starts with. Empty until the fork server is started."""


def changed_environment() -> dict[str, str]:
    """Return the variables that this process has set since it started the fork server."""
    return {name: value for name, value in os.environ.items() if _fork_server_environment.get(name) != value}


def import_ahead(modules: Sequence[str]) -> None:
    """Start the fork server, which imports `modules` in the background. Do nothing if it runs, or in a worker."""
    if is_worker() or _fork_server_environment:
        return
    # Imports ask whether there are GPUs. By default that initializes CUDA, and forked processes could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    preloaded = ["mixtral_run.launch.fork_server", "mixtral_run.launch.preload"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    os.environ[PRELOAD_VARIABLE] = ",".join(modules)
    # The kernel takes the end of the thread that starts a process for the end of its parent.
    if threading.current_thread() is threading.main_thread():
        os.environ[FORK_SERVER_PARENT] = str(os.getpid())
    _fork_server_environment.update(os.environ)
    forkserver.ensure_running()
    del os.environ[PRELOAD_VARIABLE]
    os.environ.pop(FORK_SERVER_PARENT, None)
    atexit.register(_kill_fork_server)


def has_fork_server() -> bool:
    """Return True if this process has started a fork server: its work is to start processes and to wait for them."""
    return bool(_fork_server_environment)


def _kill_fork_server() -> None:
    """Kill the fork server. By itself it would end only after its imports, and hold our stdout open until then."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


_stopped: list[bool] = []


def was_stopped() -> bool:
    """Return True if a signal asked the processes of a job, this one under torchrun, to stop, and they did in order."""
    module = sys.modules.get("mixtral_run.launch.stop_request")
    return bool(_stopped) or bool(module is not None and module.StopRequest.ended_a_run)


def start_processes(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Call `work(error_directory, *arguments)` in `count` processes of this machine, under torchrun; wait for them.

    The parent passes SIGINT and SIGTERM on; the processes then have SHUTDOWN_SECONDS to save. StopOnce handles further
    signals: it ignores a burst of them, and a later Ctrl-C ends the job at once, as a process that saves has reported
    (StopRequest).

    Raises:
        MixtralRunError: The error of a hang (hang_watch.py), else the error that a process left with
            `hand_over_error`, else a TrainingError that names the process and how it ended.
        KeyboardInterrupt: A signal ended the job before a process could stop on request.
    """
    from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as TorchrunConfig
    from torch.distributed.launcher.api import elastic_launch

    # Every logger has a level of its own, so the level of the package has no effect.
    noise = ("torch.distributed", "torch.multiprocessing")
    for noisy in [name for name in logging.root.manager.loggerDict if name.startswith(noise)]:
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # A process that has the terminal decides what Ctrl-C means.
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, *([] if is_lent() else [signal.SIGINT])]
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        job = TorchrunConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="forkserver",
            # torchrun removes no folder that it makes.
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder) / "torchrun")),
            signals_to_handle=",".join(number.name for number in numbers),
        )
        try:
            stop = StopOnce()
            with stop.installed(numbers), watching(Path(folder)) as watch:
                elastic_launch(job, work)(folder, *arguments)
        except ChildFailedError as failure:
            if watch.error is not None:
                raise watch.error from None
            if all(each.exitcode == STOPPED for each in failure.failures.values()):
                _stopped.append(True)
                return
            raise collect_error(Path(folder), failure) from None
        except SignalException:
            raise KeyboardInterrupt from None

"""Starting the processes of a job: flag → config → JSON file → torchrun → the same config → one call.

The parent stays to pass on signals and to say once what went wrong. Processes are forked from one that has imported
what they need (Python's fork server), begun while the parent still checks: eight of them importing torch and Megatron
take a GPU host ten seconds and more. Under somebody else's torchrun nothing is started.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import traceback
import uuid
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

from mixtral_run.config.fields import flag_of
from mixtral_run.config.verbs import LaunchConfig
from mixtral_run.errors import EXIT_CODES, ConfigError, MixtralRunError, TrainingError

ERROR_DIRECTORY_VARIABLE = "MIXTRAL_RUN_ERROR_DIRECTORY"
SHUTDOWN_SECONDS = 300
"""How long the processes may take to save after a stop was asked for, before they are killed."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a process of ours that was asked to end, and did. One that ends with 0 waits until torchrun has heard
of it, which after a signal no longer listens."""


def is_worker() -> bool:
    """Whether this process was started by torchrun, ours or the user's."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_ours() -> bool:
    """Whether this process was started by `torchrun` below, whose parent has done what one process does."""
    return ERROR_DIRECTORY_VARIABLE in os.environ


def rank() -> int:
    """This process's number in its job; 0 where there is no job."""
    return int(os.environ.get("RANK", "0"))


def default_num_processes(device: str) -> int:
    """One process a GPU; 2 where the job runs on the CPU. Raises ConfigError for `cuda` without a GPU."""
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
    """How many processes the job has, whatever its layout."""
    if is_worker():
        return int(os.environ["WORLD_SIZE"])
    return config.nproc_per_node or default_num_processes(config.device)


def host_process_count(count: int) -> int:
    """How many of a job's `count` processes this host has: all, unless another's torchrun spread them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count)) if is_worker() else count


def num_processes(config: LaunchConfig) -> int:
    """How many processes the job has. Raises ConfigError when the layout does not fit them."""
    count = process_count(config)
    problems = config.world_size_problems(count)
    if problems:
        tp, ep = config.tensor_model_parallel_size, config.expert_model_parallel_size
        sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep}
        smaller = " ".join(f"{flag_of(name)} {math.gcd(size, count)}" for name, size in sizes.items())
        least = math.lcm(tp, ep)
        raise ConfigError(
            f"The layout TP{tp}/EP{ep} does not fit {count} process{'es' if count != 1 else ''}.",
            problems=problems,
            next_command=f"{flag_of('nproc_per_node')} {least}, or {smaller}" if _can_start(config, least) else smaller,
        )
    return count


def _can_start(config: LaunchConfig, count: int) -> bool:
    """Whether so many processes find a place here: a GPU each, or CPUs, which they share."""
    import torch

    return config.device == "cpu" or not torch.cuda.is_available() or torch.cuda.device_count() >= count


_environment_then: dict[str, str] = {}
"""When the process began that others are forked from."""


def _environment_since() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _environment_then.get(name) != value}


def import_ahead() -> None:
    """Begin to import what the processes of a job need, in the process that they will be forked from; once."""
    if is_worker() or _environment_then:
        return
    # What is imported asks whether there are GPUs. Asked in the usual way, forked processes could not use them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["mixtral_run.launch.preload"])
    _environment_then.update(os.environ)
    forkserver.ensure_running()
    atexit.register(_end_importing)


def _end_importing() -> None:
    """The server ends with this process, but not before it has imported: who waits for our output would wait for it."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def torchrun(verb: str, config: LaunchConfig) -> None:
    """Run `mixtral-run VERB` with `config` in `num_processes(config)` processes on this machine; wait for them.

    Raises the processes' own MixtralRunError where they left one, else TrainingError naming the process and its end.
    KeyboardInterrupt and SIGTERM are passed on; the processes then have `SHUTDOWN_SECONDS` to save.
    """
    from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as TorchrunConfig
    from torch.distributed.launcher.api import elastic_launch

    count = num_processes(config)
    # Each has a level of its own: that of the package alone would not count.
    noise = ("torch.distributed", "torch.multiprocessing")
    for noisy in [name for name in logging.root.manager.loggerDict if name.startswith(noise)]:
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    import_ahead()
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        config_file = Path(folder) / "config.json"
        config_file.write_text(config.to_json(), encoding="utf-8")
        job = TorchrunConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="forkserver",
        )
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // count))
        try:
            elastic_launch(job, _work)(verb, str(config_file), threads, _environment_since())
        except ChildFailedError as failure:
            if all(each.exitcode == STOPPED for each in failure.failures.values()):
                return
            raise _worker_error(Path(folder), failure) from None
        except SignalException:
            raise KeyboardInterrupt from None


def _work(verb: str, config_file: str, threads: int, environment: dict[str, str]) -> None:
    """In a process of the job: what `mixtral-run VERB --config FILE` does."""
    import torch

    from mixtral_run.cli.main import main
    from mixtral_run.launch.stop_request import StopRequest
    from mixtral_run.model.parallel.mesh import end_with_the_job

    end_with_the_job()
    os.environ[ERROR_DIRECTORY_VARIABLE] = str(Path(config_file).parent)
    os.environ.update(environment)
    torch.set_num_threads(threads)
    sys.argv = ["mixtral-run", verb, "--config", config_file]
    try:
        main()
    except SystemExit as end:
        if not end.code and StopRequest.ended_a_run:
            sys.exit(STOPPED)
        raise
    except Exception:
        # torch would hand it to the parent and say nothing here.
        traceback.print_exc()
        sys.exit(1)


def hand_over_error(error: MixtralRunError) -> None:
    """In a process: leave the error for the parent, which tells each distinct one once."""
    folder = Path(os.environ[ERROR_DIRECTORY_VARIABLE])
    unfinished = folder / f"rank-{rank()}.partial"
    unfinished.write_bytes(pickle.dumps(error))
    unfinished.rename(folder / f"rank-{rank()}.error")


def is_consequence(error: BaseException) -> bool:
    """Whether a process failed only because another one of the job had ended."""
    return re.search(_LOST_PEER, str(error)) is not None


# The last: torch's checkpoint writer, on ranks that only hear that another one could not write.
_LOST_PEER = (
    r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|NCCL communicator was aborted"
    r"|ranks:dict_keys\(\[\]\)"
)


def leave_quietly() -> NoReturn:
    """In a process: end as failed, leaving it to the process that failed first to say why."""
    (Path(os.environ[ERROR_DIRECTORY_VARIABLE]) / f"rank-{rank()}.consequence").touch()
    sys.exit(1)


def _worker_error(folder: Path, failure: object) -> MixtralRunError:
    errors: dict[object, MixtralRunError] = {}
    for file in sorted(folder.glob("rank-*.error")):
        # Written by our own process into a folder that only this user can open.
        error = pickle.loads(file.read_bytes())
        # What each found may differ by a number.
        errors.setdefault((type(error), error.what, error.where, error.problems, error.next_command), error)
    found = list(errors.values())
    if len(found) == 1:
        return found[0]
    if found:
        worst = EXIT_CODES.get(found[0].exit_code, TrainingError)
        return worst("Several processes failed.", problems=[str(error) for error in found])
    silent = {int(file.stem.removeprefix("rank-")) for file in folder.glob("rank-*.consequence")}
    lines = [_describe_end(process) for process in _first_to_end(failure, silent)]
    return TrainingError(
        "A process of the job ended before its work was done.",
        problems=lines,
        next_command="the lines above this one say more; --debug shows tracebacks",
    )


def _first_to_end(failure: object, silent: set[int]) -> list[Any]:
    """Of the processes that failed those that did so by themselves: torchrun then ends the others, by force at last."""
    ended: list[Any] = [process for _, process in sorted(getattr(failure, "failures", {}).items())]
    first = min((process.timestamp for process in ended), default=0)
    # By the second: torchrun asks the others to end within the same one.
    by_themselves = [
        process
        for process in ended
        if process.timestamp == first and process.exitcode != -signal.SIGTERM and process.local_rank not in silent
    ]
    return by_themselves or ended


def _describe_end(process: object) -> str:
    exit_code = getattr(process, "exitcode", None)
    number = getattr(process, "local_rank", "?")
    if exit_code == -9:
        return f"rank {number}: killed (SIGKILL), which the kernel does when memory runs out: see dmesg"
    if isinstance(exit_code, int) and exit_code < 0:
        return f"rank {number}: ended by signal {-exit_code}"
    return f"rank {number}: exit code {exit_code}"

"""Process groups: who shares what. Every process of a job calls `start` first and `stop` last."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mixtral_run.config.verbs import LaunchConfig
from mixtral_run.errors import TrainingError
from mixtral_run.model.parallel.megatron import initialize_rng_tracker, parallel_state


@dataclass(frozen=True)
class Mesh:
    """This process's place in the job. Sizes and ranks are of Megatron's groups; ETP is always 1."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    expert_rank: int
    expert_size: int
    data_rank: int
    data_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that speaks and writes for the job."""
        return self.rank == 0

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """Processes that share the experts of a layer; tokens travel within it."""
        group: dist.ProcessGroup = parallel_state.get_expert_model_parallel_group()
        return group

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Processes with the same attention weights and other samples."""
        group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
        # One of all processes would take the memory of another, for the same.
        return group if self.data_size < self.world_size else _everyone()

    @property
    def expert_data_group(self) -> dist.ProcessGroup:
        """Processes that hold the same experts."""
        group: dist.ProcessGroup = parallel_state.get_expert_data_parallel_group()
        return group


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def pick_device(wanted: str) -> torch.device:
    """`auto` is this process's GPU where there is one, else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def processes(config: LaunchConfig) -> Iterator[Mesh]:
    """Join the job, build its groups for the config's layout, leave at the end. All ranks must call.

    Where the process has joined already, only the groups are built and taken down: one job may try several layouts.
    Raises TrainingError where what is done within needs more memory than there is.
    """
    device = pick_device(config.device)
    if device.type == "cpu":
        from mixtral_run.model.parallel.cpu import stand_in_for_cuda

        stand_in_for_cuda()
    else:
        torch.cuda.set_device(device)
    joined_here = not dist.is_initialized()
    set_here = _stand_alone_when_not_launched() if joined_here else []
    if joined_here:
        _join(config, device)
    leaves = True
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=config.distributed_timeout_minutes,
        )
        # Megatron's own tracker needs CUDA generators; ours are per process (`seed_everything`), so its fork is empty.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        mesh = Mesh(
            device=device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
            expert_rank=parallel_state.get_expert_model_parallel_rank(),
            expert_size=parallel_state.get_expert_model_parallel_world_size(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
        )
        seed_everything(config.seed, mesh.rank)
        yield mesh
    except BaseException as error:
        # NCCL's leaving waits for what is under way, and so for the others, who wait for this process: nobody would
        # learn what went wrong. The process's end takes it down.
        leaves = device.type == "cpu" or dist.get_world_size() == 1
        wanted = _wanted_memory(error)
        if wanted is not None:
            raise _out_of_memory(device, wanted) from error
        raise
    finally:
        parallel_state.destroy_model_parallel()
        if joined_here and leaves:
            _part(device)
        # What is started later from here is no process of this job.
        for name in set_here:
            del os.environ[name]


_ends_with_the_job = False


def end_with_the_job() -> None:
    """To be called in a process that ends, without taking itself apart, when its job is done."""
    global _ends_with_the_job
    _ends_with_the_job = True


def _part(device: torch.device) -> None:
    if _ends_with_the_job and device.type == "cuda":
        # NCCL has threads for each of Megatron's groups, some thirty, and waits a while for each to hear of it. The
        # system takes back what a process has; but none may go while another's GPU still reads from its own.
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))
    else:
        dist.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the host's: `processes` tells it."""
    return _wanted_memory(error) is not None


_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def _wanted_memory(error: BaseException) -> str | None:
    """What torch asked for in vain, in its words; None where the error is another one."""
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return next((part for part in message.split(". ") if "allocate" in part), message)
    # What is not asked of torch's GPU allocator ends in a plain RuntimeError: the CPU's, the driver's own, cuBLAS's.
    if isinstance(error, RuntimeError):
        for words in _OUT_OF_MEMORY:
            if words in message:
                return message[message.index(words) :].splitlines()[0]
    return None


def _out_of_memory(device: torch.device, wanted: str) -> TrainingError:
    """Without the rank: processes that run out alike say it once."""
    return TrainingError(
        "A GPU's memory is full." if device.type == "cuda" else "This machine's memory is full.",
        found=wanted,
        next_command="a smaller --micro-batch-size or --seq-length, --recompute full or offload, or more processes "
        "under --expert-model-parallel-size; `mixtral-run plan` says what fits",
    )


def _join(config: LaunchConfig, device: torch.device) -> None:
    dist.init_process_group(
        # Checkpoint planning sends Python objects: these go over gloo, so that NCCL carries tensors only.
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=timedelta(minutes=config.distributed_timeout_minutes),
        # No device_id: with it NCCL sets up each of Megatron's thirty groups at once, 5 GiB of each GPU, where two or
        # three are ever used.
    )


def _stand_alone_when_not_launched() -> list[str]:
    """A job of one process needs no launcher: say in its words that it is alone. Returns what had to be set."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    missing = [name for name in alone if name not in os.environ]
    os.environ.update({name: alone[name] for name in missing})
    return missing


def seed_everything(seed: int, rank: int) -> None:
    """Seed this process's generators; each process draws its own dropout. Weights are seeded apart, by name."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum in place over `group`; all its ranks must call. Nothing is sent in a group of one."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def everywhere(value: bool, device: torch.device) -> bool:
    """Whether that is so on all ranks, which must call, each with its device."""
    if dist.get_world_size() == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def refused(step: Callable[[], object], device: torch.device) -> str | None:
    """Take a step that does not go everywhere. None where it went on all ranks, which must call; else why it did not
    here, or "" where it did: the next step would wait for those that it did not go on."""
    why = ""
    try:
        step()
    except (ImportError, AttributeError, RuntimeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
    return None if everywhere(not why, device) else why

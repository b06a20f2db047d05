"""The process mesh: process groups of a job, and this rank's place in them. `open_mesh` joins a job and leaves it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mixtral_run.config.launch import LaunchConfig, layout_name
from mixtral_run.errors import TrainingError
from mixtral_run.model.parallel.gpu_context import begin_context
from mixtral_run.model.parallel.megatron import initialize_rng_tracker, parallel_state


@dataclass(frozen=True)
class Mesh:
    """This process's place in the job. Sizes and ranks are those of Megatron's groups; ETP is always 1."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    expert_rank: int
    expert_size: int
    data_rank: int
    data_size: int
    context_rank: int = 0
    context_size: int = 1

    @property
    def is_first(self) -> bool:
        """Return True on the one rank that prints and writes for the job."""
        return self.rank == 0

    @property
    def layout(self) -> str:
        """Return the layout for people, such as TP2/EP4 or TP1/CP2/EP4."""
        return layout_name(self.tensor_size, self.expert_size, self.context_size)

    @property
    def ranks_of_a_row(self) -> int:
        """Return the number of ranks that split the tokens of a row: TP under sequence parallelism, and CP."""
        return self.tensor_size * self.context_size

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Return the processes that hold parts of the same attention weights."""
        group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """Return the processes that share the experts of a layer, and exchange tokens."""
        group: dist.ProcessGroup = parallel_state.get_expert_model_parallel_group()
        return group

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Return the processes that hold the same attention weights and process different tokens: other samples, or,
        under context parallelism, other parts of the same samples.
        """
        group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # Reuse the group of all processes: another communicator of the same ranks would take memory for nothing.
        return group if self.data_size * self.context_size < self.world_size else _everyone()

    @property
    def context_group(self) -> dist.ProcessGroup:
        """Return the processes that process different parts of the same samples with the same attention weights."""
        group: dist.ProcessGroup = parallel_state.get_context_parallel_group()
        return group if self.context_size < self.world_size else _everyone()

    @property
    def expert_data_group(self) -> dist.ProcessGroup:
        """Return the processes that hold the same experts."""
        group: dist.ProcessGroup = parallel_state.get_expert_data_parallel_group()
        return group


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def pick_device(wanted: str) -> torch.device:
    """Return the device of this rank; `auto` is its GPU if there is one, else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def open_mesh(config: LaunchConfig) -> Iterator[Mesh]:
    """Join the job, build the groups of the config's layout, yield the mesh, and leave the job. All ranks must call.

    If the process has joined already, only the groups are built and destroyed: one job may try several layouts. Raises
    TrainingError if the body of the context runs out of memory.
    """
    tensor_size, expert_size = config.layout_sizes
    device = pick_device(config.device)
    context = None
    if device.type == "cpu":
        from mixtral_run.model.parallel.cpu import stand_in_for_cuda

        stand_in_for_cuda()
    else:
        # The groups need no context of the GPU, and it takes a third of a second and more.
        context = begin_context(device.index)
    joined_here = not dist.is_initialized()
    set_here = _stand_alone_when_not_launched() if joined_here else []
    if joined_here:
        _join(config, device)
    leaves = True
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            context_parallel_size=config.context_size,
            expert_model_parallel_size=expert_size,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=config.distributed_timeout_minutes,
            # Of Megatron's own optimizer.
            create_gloo_process_groups=False,
        )
        if context is not None:
            context.join()
            torch.cuda.set_device(device)
        # Megatron's own tracker needs CUDA generators; the kit seeds one generator a process (`seed_everything`)
        # instead.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        mesh = _mesh_of(device)
        seed_everything(config.seed, mesh.rank)
        yield mesh
    except BaseException as error:
        # Destroying an NCCL group waits for pending collectives, and so for the other ranks, which wait for this one:
        # the error would never be reported. The end of the process destroys the group.
        leaves = device.type == "cpu" or dist.get_world_size() == 1
        wanted = _wanted_memory(error)
        if wanted is not None:
            raise _out_of_memory(device, wanted) from error
        raise
    finally:
        parallel_state.destroy_model_parallel()
        if joined_here and leaves:
            _part(device)
        # Processes that are started later from here are not part of this job.
        for name in set_here:
            del os.environ[name]


def _mesh_of(device: torch.device) -> Mesh:
    """Return this rank's place in the groups that Megatron has built."""
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
    )


_ends_with_the_job = False


def end_with_the_job() -> None:
    """Declare that this process exits when its job is done, so that process groups need not be destroyed."""
    global _ends_with_the_job
    _ends_with_the_job = True


def _part(device: torch.device) -> None:
    if _ends_with_the_job and device.type == "cuda":
        # Destroying Megatron's groups, some thirty, waits for the NCCL threads of each. The operating system frees all
        # resources instead; but no process may exit while another's GPU still reads its memory.
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))
    else:
        dist.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if a GPU or the host ran out of memory: `open_mesh` reports such errors."""
    return _wanted_memory(error) is not None


_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def _wanted_memory(error: BaseException) -> str | None:
    """Return the allocation that failed, in torch's words; None for other errors."""
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return next((part for part in message.split(". ") if "allocate" in part), message)
    # Failures of the CPU allocator, the driver and cuBLAS are plain RuntimeErrors.
    if isinstance(error, RuntimeError):
        for words in _OUT_OF_MEMORY:
            if words in message:
                return message[message.index(words) :].splitlines()[0]
    return None


def _out_of_memory(device: torch.device, wanted: str) -> TrainingError:
    """Return the error without the rank: identical errors of several ranks are reported once."""
    return TrainingError(
        "A GPU's memory is full." if device.type == "cuda" else "This machine's memory is full.",
        found=wanted,
        next_command="a smaller --micro-batch-size or --seq-length, --recompute full or offload, a larger "
        "--recompute-layers, or more processes under --expert-model-parallel-size; `mixtral-run plan` reports what "
        "fits",
    )


def _join(config: LaunchConfig, device: torch.device) -> None:
    dist.init_process_group(
        # Checkpoint planning sends Python objects: gloo carries these, and NCCL only tensors.
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=timedelta(minutes=config.distributed_timeout_minutes),
        # No device_id: with it NCCL creates the communicators of Megatron's thirty groups at once, which takes 5 GiB of
        # each GPU; only two or three groups are ever used.
    )


def _stand_alone_when_not_launched() -> list[str]:
    """Set the launcher's variables for a job of one process if there is no launcher; return those that were set."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    missing = [name for name in alone if name not in os.environ]
    os.environ.update({name: alone[name] for name in missing})
    return missing


def seed_everything(seed: int, rank: int) -> None:
    """Seed this rank's generators, so that each rank draws its own dropout. Weights are seeded separately, by name."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum in place over `group`, and return the tensor. All ranks of the group must call."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def everywhere(value: bool, device: torch.device) -> bool:
    """Return True if the value is True on all ranks. All ranks must call, each with its device."""
    if dist.get_world_size() == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def refused(step: Callable[[], object], device: torch.device) -> str | None:
    """Try a step that may fail on some ranks. All ranks must call.

    Returns None if it succeeded on all ranks; otherwise why it failed on this rank, or "" if it succeeded here. Then no
    rank may take the next step, which would wait for the failed ranks.
    """
    why = ""
    try:
        step()
    except (ImportError, AttributeError, RuntimeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
    return None if everywhere(not why, device) else why

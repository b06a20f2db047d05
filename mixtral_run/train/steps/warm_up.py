"""Prepare the GPU and the libraries for the first step while weights are read: the host often waits then."""

from __future__ import annotations

import importlib

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from mixtral_run.launch.heartbeat import unnoted
from mixtral_run.model.kernels.grouped_mm import has_grouped_product, prepare_products
from mixtral_run.model.kernels.selected import kernels_of
from mixtral_run.model.parallel.mesh import Mesh

KERNELS = (
    "narrow_mm_triton", "norm_triton", "permute_triton", "rotary_triton", "sort_triton", "swiglu_triton",
    "symmetric_memory_triton", "loss.cross_entropy_triton", "optimizer.adamw_triton", "routing.router_triton",
)  # fmt: skip
"""Modules of the kernels of a step, in mixtral_run.model.kernels."""


def warm_up(mesh: Mesh, dtype: torch.dtype) -> None:
    """Open NCCL's communicators and load the kernels' modules. All ranks must call.

    Meant for a thread. Meanwhile no other thread may call a collective of GPUs: each rank would order them by chance.
    """
    if mesh.device.type != "cuda":
        return
    torch.cuda.set_device(mesh.device)
    open_communicators(mesh)
    probe = torch.empty(1, dtype=dtype, device=mesh.device)
    if kernels_of(mesh.device) is None or not has_grouped_product(probe):
        return
    from triton.runtime import driver

    for name in KERNELS:
        importlib.import_module(f"mixtral_run.model.kernels.{name}")
    if mesh.expert_size > 1:
        importlib.import_module("torch.distributed._symmetric_memory")
    driver.active.get_current_target()
    prepare_products(probe)
    with torch.no_grad():
        # The libraries of dense products and of attention are loaded by their first call, a second from a cold disk.
        heads = torch.zeros(1, 2, 128, 128, dtype=dtype, device=mesh.device)
        scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        torch.mm(heads[0, 0], heads[0, 1])


def open_communicators(mesh: Mesh) -> None:
    """Let NCCL open the communicators of the groups that training uses, by a sum over each. All ranks must call.

    NCCL opens one with the first collective of a group, which takes from 0.2 s to a second. Those of Megatron's other
    groups are never opened.
    """
    groups = [mesh.data_group, mesh.expert_group, mesh.tensor_group, mesh.expert_data_group]
    if mesh.context_size > 1:
        groups.append(mesh.context_group)
    world = dist.group.WORLD
    assert world is not None
    with unnoted():
        for group in dict.fromkeys([world, *groups]):
            if group.size() > 1:
                dist.all_reduce(torch.zeros(1, device=mesh.device), group=group)
        if mesh.device.type == "cuda":
            torch.cuda.current_stream(mesh.device).synchronize()

"""One rank's slice of a parameter: the rows whose master weights and moments it keeps and updates (ZeRO, stage 1).

A parameter is cut into rows of equal number for the ranks of the group that holds the same values; the last ranks may
have fewer, or none. Slices are rectangles of the global tensor, so that a checkpoint has them under Megatron's keys and
any other layout can read its own rectangles from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.parallel.param_sharding import is_expert, is_partial, is_split
from mixtral_run.train.checkpoints.host_copy import pin

STATES = ("master", "exp_avg", "exp_avg_sq")
"""What is kept of each weight, in fp32: the weight itself, and AdamW's two moments."""

# torch 2.13 renames these collectives, and warns about the former names.
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@dataclass
class StateSlice:
    """The rows first…last of a parameter as a matrix [rows, columns], and their state.

    Attributes:
        name: of the parameter in the model.
        group: the ranks that hold the same values; each has a slice.
        per_rank: rows of a slice, except for the last ones.
        states: fp32 [last - first, columns] by the names of STATES, on the device or in the host's memory.
        total: the sum of the gradients of several micro batches, fp32 of the parameter's shape; None without any.
        gradient: of the slice, reduced over the group; between `reduce` and the update.
    """

    name: str
    parameter: torch.nn.Parameter
    group: dist.ProcessGroup
    per_rank: int
    first: int
    last: int
    states: dict[str, Tensor]
    total: Tensor | None = field(default=None)
    gradient: Tensor | None = field(default=None)

    @property
    def matrix(self) -> Tensor:
        """Return the parameter as a matrix [rows, columns], a view."""
        return as_matrix(self.parameter.detach())

    def accumulate(self) -> None:
        """Add the gradient of a micro batch to `total`, and free it."""
        gradient = self.parameter.grad
        assert gradient is not None
        if self.total is None:
            self.total = gradient.float()
        else:
            self.total.add_(gradient)
        self.parameter.grad = None

    def reduce(self, mesh: Mesh) -> None:
        """Sum the gradient over all ranks that computed a part of it, and keep that of the slice. All ranks must call.

        Sums over ranks are in fp32. Where one rank alone has the parameter, its gradient stays in its dtype, which
        needs no further memory.
        """
        gradient = self.total if self.total is not None else self.parameter.grad
        self.total = self.parameter.grad = None
        if gradient is None:
            # No token reached it.
            gradient = torch.zeros_like(self.parameter)
        matrix = as_matrix(gradient)
        if is_partial(self.parameter) and mesh.tensor_size > 1:
            matrix = matrix.float()
            dist.all_reduce(matrix, group=mesh.tensor_group)
        size = self.group.size()
        if size == 1:
            self.gradient = matrix
            return
        padded = _padded(matrix.float(), self.per_rank * size)
        own = torch.empty(self.per_rank, matrix.shape[1], dtype=torch.float32, device=matrix.device)
        # Looked up at each call: the heartbeat replaces the functions of torch.distributed.
        getattr(dist, _REDUCE_SCATTER)(own.view(-1), padded.view(-1), group=self.group)
        self.gradient = own[: self.last - self.first]

    def gather(self, own: Tensor) -> None:
        """Fill the parameter from the slices of all ranks. own: this rank's, fp32. All ranks of the group must call."""
        matrix, size = self.matrix, self.group.size()
        if size == 1:
            matrix.copy_(own)
            return
        part = _padded(own.to(matrix.dtype), self.per_rank)
        whole = matrix
        if self.per_rank * size != matrix.shape[0]:
            whole = matrix.new_empty(self.per_rank * size, matrix.shape[1])
        getattr(dist, _ALL_GATHER)(whole.view(-1), part.view(-1), group=self.group)
        if whole is not matrix:
            matrix.copy_(whole[: matrix.shape[0]])

    def writes(self, mesh: Mesh) -> bool:
        """Return True if this rank writes the slice into a checkpoint: TP ranks may have the same one."""
        return is_expert(self.parameter) or is_split(self.parameter) or mesh.tensor_rank == 0


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a view [rows, columns] of a weight: that of experts [experts, out, in] has the rows of all of them."""
    return tensor.view(-1, 1) if tensor.dim() == 1 else tensor.view(-1, tensor.shape[-1])


def slices_of(model: MixtralModel, *, in_host_memory: bool) -> list[StateSlice]:
    """Return this rank's slices of all parameters, in an order that is the same on all ranks. Moments are zeros.

    in_host_memory: keep the states in pinned memory of the host instead of on the GPU.
    """
    mesh, found = model.mesh, []
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.is_contiguous(), name
        group = mesh.expert_data_group if is_expert(parameter) else mesh.data_group
        matrix = as_matrix(parameter.detach())
        rows, size, rank = matrix.shape[0], group.size(), dist.get_rank(group)
        per_rank = -(-rows // size)
        first, last = min(rank * per_rank, rows), min((rank + 1) * per_rank, rows)
        place = torch.device("cpu") if in_host_memory else mesh.device
        states = {each: torch.zeros(last - first, matrix.shape[1], device=place) for each in STATES}
        if in_host_memory and mesh.device.type == "cuda":
            for each in states.values():
                pin(each)
        states["master"].copy_(matrix[first:last])
        found.append(StateSlice(name, parameter, group, per_rank, first, last, states))
    return found


def _padded(matrix: Tensor, rows: int) -> Tensor:
    """Return a contiguous matrix with zeros after its last row, up to `rows`; itself if it has as many."""
    if matrix.shape[0] == rows:
        return matrix.contiguous()
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))

"""AdamW over all weights, with fp32 master weights and moments sharded over data-parallel ranks (ZeRO, stage 1).

The weights stay whole on every rank of a data-parallel group. A step sums each gradient over the group so that every
rank gets its slice (reduce-scatter), updates the slice in fp32, and shares the new weights (all-gather). Slices of
experts are shared among the ranks that hold the same experts, those of all other weights among the ranks that hold the
same attention weights.

megatron-core's DistributedOptimizer does the same and is not used, for three reasons (version 0.16.1). Its buffers and
type checks insist on CUDA (distributed/param_and_grad_buffer.py, optimizer/distrib_optimizer.py,
optimizer/clip_grads.py), so that nothing could be proved on a CPU. It cuts flat buffers anywhere, so that its states
are no rectangles of the tensors: its checkpoints can be read by itself alone, through pickles, which the kit does not
load. And it has no way to keep all states in host memory while a GPU computes the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mixtral_run.model.adapters.trained_also import is_norm
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import sum_over
from mixtral_run.model.parallel.param_sharding import is_expert, is_split
from mixtral_run.train.full.state_slice import STATES, StateSlice, slices_of

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class ShardedAdamW:
    """AdamW whose states are sharded. All ranks must construct one and call its methods.

    Norms have no weight decay, which would pull them to 0 from 1.

    Attributes:
        slices: this rank's, in the order of the model's parameters.
        num_steps: steps that were taken.
    """

    def __init__(self, model: MixtralModel, weight_decay: float, *, offload: bool = False) -> None:
        """offload: keep the states in the host's memory; they visit the GPU one weight at a time."""
        self._mesh = model.mesh
        self._weight_decay = weight_decay
        self._model = model
        self.slices = slices_of(model, in_host_memory=offload)
        self.num_steps = 0
        self._before_step: list[Callable[..., None]] = []

    def register_step_pre_hook(self, hook: Callable[..., None], /) -> None:
        """Call `hook` before each step changes weights or states."""
        self._before_step.append(hook)

    @property
    def num_state_bytes(self) -> int:
        """Return the bytes of this rank's states."""
        return sum(tensor.nbytes for each in self.slices for tensor in each.states.values())

    def accumulate_in_fp32(self) -> None:
        """Add up the gradients of several micro batches in fp32 from now on, and free each one at once.

        A sum in bf16 would lose what is smaller than 1/256 of it. In a model in fp32, autograd's own sum is one in
        fp32.
        """
        if self._model.settings.dtype is torch.float32:
            return
        for each in self.slices:
            each.parameter.register_post_accumulate_grad_hook(lambda _, own=each: own.accumulate())

    def begin(self) -> None:
        """Forget the gradients of an earlier step that was not taken."""
        for each in self.slices:
            each.total = each.gradient = each.parameter.grad = None

    def reduce_gradients(self) -> Tensor:
        """Reduce all gradients to the slices, and return the norm of the model's gradient, an fp32 scalar.

        Each weight counts once. The gradients of the parameters are freed.
        """
        device = self._mesh.device
        squares = {kind: torch.zeros((), device=device) for kind in ("experts", "split", "replicated")}
        for each in self.slices:
            each.reduce(self._mesh)
            kind = "experts" if is_expert(each.parameter) else "split" if is_split(each.parameter) else "replicated"
            squares[kind] += torch.linalg.vector_norm(_gradient(each), dtype=torch.float32).square()
        sum_over(squares["experts"], self._mesh.expert_data_group)
        sum_over(squares["experts"], self._mesh.expert_group)
        sum_over(squares["split"], self._mesh.data_group)
        sum_over(squares["split"], self._mesh.tensor_group)
        sum_over(squares["replicated"], self._mesh.data_group)
        return torch.stack(tuple(squares.values())).sum().sqrt()

    @torch.no_grad()
    def step(self, rate: float, factor: Tensor | None) -> None:
        """Update the weights at a learning rate. factor: the gradients are multiplied by it, for clipping."""
        for hook in self._before_step:
            hook()
        for each in self.slices:
            gradient = _gradient(each).float()
            each.gradient = None
            if factor is not None:
                gradient.mul_(factor)
            master = self._update(each, gradient, rate)
            each.gather(master)
        self.num_steps += 1

    def _update(self, own: StateSlice, gradient: Tensor, rate: float) -> Tensor:
        """Update the states of a slice; return its new master weights on the device of the gradient."""
        device = gradient.device
        if gradient.numel() == 0:
            return own.states["master"].to(device)
        # The same stream copies to the GPU, updates and copies back, so that nothing has to wait for it on the host.
        moved = {name: own.states[name].to(device, non_blocking=True) for name in STATES}
        adamw(
            [moved["master"]],
            [gradient],
            [moved["exp_avg"]],
            [moved["exp_avg_sq"]],
            [],
            [torch.tensor(float(self.num_steps), device=device)],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0 if is_norm(own.name) else self._weight_decay,
            eps=EPSILON,
            maximize=False,
        )
        for name, tensor in moved.items():
            if tensor is not own.states[name]:
                own.states[name].copy_(tensor, non_blocking=True)
        return moved["master"]


def _gradient(own: StateSlice) -> Tensor:
    assert own.gradient is not None
    return own.gradient

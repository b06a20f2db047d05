"""Forward and backward of a micro batch as one CUDA graph.

A layer launches some two hundred kernels; at 512 tokens the host needs longer to launch them than the GPU to run them.
A graph is recorded once and replayed, exchanges with other processes included. That needs fixed shapes and no wait for
the GPU in between: where experts are spread over processes, tokens are gathered (model/dispatch/all_gather.py), and
where that
does not pay or does not go, nothing is recorded. Packed rows hold now more samples, now fewer: as many as the fullest
of the run has are recorded, most of them with fewer tokens or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.dispatch import capacity
from mixtral_run.model.dispatch.all_gather import AllGatherDispatcher
from mixtral_run.model.dispatch.base import TokenDispatcher
from mixtral_run.model.dispatch.symmetric_memory import SymmetricMemoryDispatcher, open_symmetric_memory
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.packed_attention import Packed, PackedSizes
from mixtral_run.train.data.samples import MicroBatch
from mixtral_run.train.step import Backward, EagerBackward, trainable

WARM_UP = 2
"""Runs before the first recording: kernels are compiled and libraries set up outside the graph. Not before the second:
beside the first one's memory they would need their own, that of all activations."""


def can_record(model: MixtralModel, num_tokens: int, *, read: bool = False) -> bool:
    """Whether this model's pass over a micro batch of so many tokens can be recorded, and pays: it never waits for the
    GPU. read: GPUs read from each other (model/dispatch/symmetric_memory.py). The same on all ranks."""
    mesh, recompute, lora = model.mesh, model.settings.recompute, model.settings.lora
    return (
        # Layers that run again read the state of the random numbers where there is dropout.
        (recompute in ("none", "selective") or (recompute == "full" and lora is not None and lora.dropout == 0))
        and (mesh.expert_size == 1 or can_gather(model, num_tokens, read=read))
        and model.is_capturable
    )


def can_gather(model: MixtralModel, num_tokens: int, *, read: bool = False) -> bool:
    """Whether experts in other processes can get the tokens of such a micro batch as all_gather.py has it, and that
    pays. The same on all ranks."""
    mesh = model.mesh
    pays = capacity.pays(num_tokens // mesh.tensor_size, mesh.expert_size, read=read)
    return pays and all(each.adapted for each in model.experts) and model.is_capturable


@contextmanager
def backward_of(
    model: MixtralModel,
    num_tokens: int,
    *,
    recorded: bool = True,
    reads: bool = True,
    most: PackedSizes | None = None,
) -> Iterator[Backward]:
    """The fastest way of a micro batch of so many tokens through the model, recorded where that is wanted and goes.

    reads: whether there is memory for what GPUs read from each other (plan.within). most: where rows are packed, what
    they hold. All ranks must call.

    To be left before the processes part: NCCL waits for the recordings that its exchanges are in.
    """
    mesh = model.mesh
    exchange = None
    if can_gather(model, num_tokens, read=True):
        exchange = open_symmetric_memory(
            mesh, model.architecture, num_tokens // mesh.tensor_size, model.settings.dtype, wanted=reads
        )
    dispatcher: TokenDispatcher[Any] | None = None
    if exchange is not None:
        dispatcher = SymmetricMemoryDispatcher(exchange, mesh.device)
    elif can_gather(model, num_tokens):
        dispatcher = AllGatherDispatcher(mesh.expert_group, model.architecture.num_experts, mesh.device)
    if recorded and can_record(model, num_tokens, read=exchange is not None):
        backward = RecordedBackward(model, dispatcher, most)
        yield backward
        # Not after an error: what was started may wait for a process that is no more.
        backward.forget()
    else:
        yield EagerBackward(model, dispatcher)
    if exchange is not None:
        exchange.close()


class RecordedBackward(Backward):
    """As EagerBackward, recorded: once for a micro batch that finds no gradients and leaves its own, and once, where
    it comes to that, for one that adds to them. The gradients stay in the same memory, which the recordings share.

    All ranks record at the same time.
    """

    def __init__(
        self,
        model: MixtralModel,
        dispatcher: TokenDispatcher[Any] | None = None,
        most: PackedSizes | None = None,
    ) -> None:
        super().__init__(model, dispatcher)
        self._parameters = trainable(model)
        self._most = most
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._recorded: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, micro: MicroBatch, num_loss_tokens: int) -> Tensor:
        adds = any(parameter.grad is not None for parameter in self._parameters)
        given = self._given(micro, num_loss_tokens)
        if not self._inputs:
            self._inputs = [new.to(self.model.mesh.device) for new in given]
        for held, new in zip(self._inputs, given, strict=True):
            held.copy_(new, non_blocking=True)
        assert not adds or self._gradients, "what is added to are the gradients that the first micro batch left"
        if adds not in self._recorded:
            self._record(adds)
        graph, loss = self._recorded[adds]
        graph.replay()
        if not adds:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        return loss

    def forget(self) -> None:
        """Let go of the recordings and of the gradients in their memory."""
        torch.cuda.synchronize()
        for graph, _ in self._recorded.values():
            graph.reset()
        self._recorded.clear()
        self._gradients.clear()
        self._drop_gradients()

    def _given(self, micro: MicroBatch, num_loss_tokens: int) -> list[Tensor]:
        """What a pass takes, on the host."""
        given = [micro.tokens, micro.labels, micro.loss_mask / num_loss_tokens]
        if self._most is not None:
            assert micro.lengths is not None
            packed = Packed.of(micro.lengths, micro.tokens.device, self._most)
            given += [micro.position_ids, packed.boundaries, packed.owner]
        return given

    def _record(self, adds: bool) -> None:
        """What runs while it is recorded is only recorded: gradients that are there stay as they are."""
        pool = None
        if self._recorded:
            pool = next(iter(self._recorded.values()))[0].pool()
        else:
            self._warm_up()
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread that looks after what is under way; what it does is not to be taken for part of this.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = self._pass(adds)
        if not adds:
            self._gradients = [parameter.grad for parameter in self._parameters]
        self._recorded[adds] = graph, loss

    def _warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._pass(adds=False)
        torch.cuda.current_stream().wait_stream(side)
        # Before recording frees the allocator's blocks: each would hold on to the large one it was cut from.
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _pass(self, adds: bool) -> Tensor:
        if not adds:
            self._drop_gradients()
        tokens, labels, weights, *rest = self._inputs
        positions, packed = None, None
        if self._most is not None:
            positions, boundaries, owner = rest
            packed = Packed(boundaries, owner, self._most.longest)
        with self.model.dispatching(self.dispatcher):
            loss = (self.model.losses(tokens, labels, positions=positions, packed=packed) * weights).sum()
            loss.backward()
        return loss.detach()

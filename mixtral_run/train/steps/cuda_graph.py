"""Forward and backward pass of a micro batch as one CUDA graph.

A layer launches some two hundred kernels; at 512 tokens the host needs longer to launch them than the GPU to run them.
A graph is captured once and replayed, collectives included. Capture requires fixed shapes and no host synchronization:
experts that are spread over ranks need a dispatch of fixed shapes (model/dispatch/all_gather.py). If that does not pay
or is not possible, the pass runs eagerly (planner/policy.py decides). Packed rows hold a varying number of
samples: the graph has as many as the fullest row of the run, most of them with fewer tokens or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.allocator import growing_segments
from mixtral_run.model.attention.packed_attention import Packed, PackedSizes
from mixtral_run.model.dispatch.all_gather import AllGatherDispatcher
from mixtral_run.model.dispatch.base import TokenDispatcher
from mixtral_run.model.dispatch.symmetric_memory import SymmetricMemoryDispatcher, open_symmetric_memory
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.planner import policy
from mixtral_run.train.data.samples import MicroBatch
from mixtral_run.train.steps.captured_losses import CapturedLosses, copy_into
from mixtral_run.train.steps.exchange import Flat, GradientExchange, open_exchange
from mixtral_run.train.steps.objective import Objective, backward
from mixtral_run.train.steps.step import Backward, EagerBackward, trainable

WARM_UP = 1
"""Eager runs before the first capture: they compile kernels and set up libraries outside the graph. A second run would
find nothing to set up. The second capture needs none: next to the first graph's memory, eager runs would need that of
all activations again."""


def execution_of(model: MixtralModel, num_tokens: int, *, peer_access: bool = False) -> policy.Execution:
    """Return the dispatch of this model's training pass, and whether the pass can be captured. The same on all ranks.

    Args:
        model: in training mode.
        num_tokens: tokens of a micro batch, over all ranks that share its rows.
        peer_access: True if GPUs read from each other (model/dispatch/symmetric_memory.py).
    """
    mesh, lora = model.mesh, model.settings.lora
    return policy.execution_of(
        policy.TrainingPass(
            tokens=num_tokens // mesh.ranks_of_a_row,
            expert_size=mesh.expert_size,
            recompute=model.settings.recompute,
            lora_dropout=lora.dropout if lora is not None else None,
            fused_experts=all(each.adapted for each in model.experts),
            syncs_with_host=not model.is_capturable,
            peer_access=peer_access,
            expert_chunks=model.settings.expert_chunks,
        )
    )


@contextmanager
def backward_of(
    model: MixtralModel,
    num_tokens: int,
    *,
    captured: bool = True,
    peer_access: bool = True,
    most: PackedSizes | None = None,
    objective: Objective | None = None,
) -> Iterator[Backward]:
    """Yield the fastest way of a micro batch through the model. All ranks must call.

    Leave the context before the ranks part: NCCL waits for the graphs that contain its collectives.

    Args:
        model: in training mode.
        num_tokens: tokens of a micro batch, over all ranks that share its rows.
        captured: capture the pass if possible.
        peer_access: let GPUs read from each other if possible; False if there is no memory for it
            (planner/choose.py).
        most: the largest sizes of the run's packed rows, if rows are packed.
        objective: the loss; the cross entropy of the response tokens by default.
    """
    mesh = model.mesh
    exchange = None
    execution = execution_of(model, num_tokens, peer_access=True)
    if execution.dispatch is policy.Dispatch.SYMMETRIC_MEMORY:
        tokens = num_tokens // mesh.ranks_of_a_row
        exchange = open_symmetric_memory(mesh, model.architecture, tokens, model.settings.dtype, wanted=peer_access)
        if exchange is None:
            execution = execution_of(model, num_tokens, peer_access=False)
    dispatcher: TokenDispatcher[Any] | None = None
    if exchange is not None:
        dispatcher = SymmetricMemoryDispatcher(exchange, mesh.device)
    elif execution.dispatch is policy.Dispatch.ALL_GATHER:
        dispatcher = AllGatherDispatcher(mesh.expert_group, model.architecture.num_experts, mesh.device)
    sums = open_exchange(model)
    if captured and execution.captured:
        backward = CapturedBackward(model, dispatcher, most, objective, sums)
        yield backward
        # Not after an error: a collective under way may wait for a rank that has ended.
        backward.release()
    else:
        with growing_segments(mesh.device):
            yield EagerBackward(model, dispatcher, objective, sums)
    if sums is not None:
        sums.close()
    if exchange is not None:
        exchange.close()


class CapturedBackward(Backward):
    """The pass of EagerBackward as CUDA graphs: one for a micro batch that finds no gradients and leaves its own, and,
    if an iteration has several, one for a micro batch that adds to them.

    Both graphs share their memory, and the gradients stay in it. All ranks capture at the same time.
    """

    def __init__(
        self,
        model: MixtralModel,
        dispatcher: TokenDispatcher[Any] | None = None,
        most: PackedSizes | None = None,
        objective: Objective | None = None,
        exchange: GradientExchange | None = None,
    ) -> None:
        super().__init__(model, dispatcher, objective, exchange)
        self._parameters = trainable(model)
        self._most = most
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._flats: list[tuple[Flat, ...] | None] = []
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._losses: CapturedLosses | None = None

    def __call__(self, micro: MicroBatch, num_loss_tokens: int) -> Tensor:
        adds = any(parameter.grad is not None for parameter in self._parameters)
        inputs = self._inputs_of(micro, num_loss_tokens)
        if not self._inputs:
            self._inputs = [new.to(self.model.mesh.device, copy=True) for new in inputs]
        copy_into(self._inputs, inputs)
        # Outside of the graph: the adapters are the same for all micro batches of a step.
        self.model.refresh_adapters()
        assert not adds or self._gradients, "existing gradients must be those that the first micro batch left"
        if adds not in self._graphs:
            self._capture(adds)
        graph, parts = self._graphs[adds]
        graph.replay()
        if not adds:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
            if self.exchange is not None:
                self.exchange.flats = list(self._flats)
        if self.exchange is not None and self.exchange.is_last:
            self.exchange.start_all()
        return parts

    def evaluated(self, micro: MicroBatch) -> Tensor:
        """Capture the pass if it has the shapes of training, in the memory that the graphs of training leave free.

        In the first step it runs eagerly, which compiles kernels. Rows that are packed for the objective have lengths
        of their own, and experts of other ranks need an exchange whose capacity must be checked: both stay eager.
        """
        if not self._graphs or micro.lengths is not None or self.model.mesh.expert_size > 1:
            return super().evaluated(micro)
        if self._losses is None:
            self._losses = CapturedLosses(self.model, micro, next(iter(self._graphs.values()))[0].pool())
        return self._losses(micro)

    def release(self) -> None:
        """Free the graphs and the gradients in their memory."""
        torch.cuda.synchronize()
        if self._losses is not None:
            self._losses.release()
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._gradients.clear()
        self._flats.clear()
        self._drop_gradients()

    def _inputs_of(self, micro: MicroBatch, num_loss_tokens: int) -> list[Tensor]:
        """Return the inputs of a pass. Their shapes are the same in all micro batches."""
        inputs = [*self.objective.inputs(micro, num_loss_tokens, self._most), micro.tokens, micro.labels]
        if self._most is not None:
            assert micro.lengths is not None
            packed = Packed.of(micro.lengths, micro.tokens.device, self._most)
            inputs += [micro.position_ids, packed.boundaries, packed.owner]
        return inputs

    def _capture(self, adds: bool) -> None:
        """Capture the pass. Nothing runs during a capture, so that existing gradients keep their values."""
        pool = None
        if self._graphs:
            pool = next(iter(self._graphs.values()))[0].pool()
        else:
            self._warm_up()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread makes CUDA calls, which must not count as part of the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            parts = self._pass(adds)
        if not adds:
            self._gradients = [parameter.grad for parameter in self._parameters]
            self._flats = list(self.exchange.flats) if self.exchange is not None else []
        self._graphs[adds] = graph, parts

    def _warm_up(self) -> None:
        # A resumed run warms up as well, and must draw the same dropout as a run that was not interrupted.
        random_state = torch.cuda.get_rng_state(self.model.mesh.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._pass(adds=False)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(random_state, self.model.mesh.device)
        if self.model.router_counts is not None:
            # It is the first micro batch of a step that captures.
            self.model.router_counts.begin_step()
        # Before the capture frees the allocator's blocks: each gradient would hold the large block it was cut from.
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        if self.exchange is not None:
            self.exchange.begin_step()

    def _pass(self, adds: bool) -> Tensor:
        if not adds:
            self._drop_gradients()
        inputs, positions, packed = self._inputs, None, None
        if self._most is not None:
            *inputs, positions, boundaries, owner = inputs
            packed = Packed(boundaries, owner, self._most.longest)
        *inputs, tokens, labels = inputs
        counts, balance = self.model.router_counts, self.model.router_loss
        with (
            counts.counting(inputs[0]) if counts is not None else nullcontext(),
            balance.counting(inputs[0]) if balance is not None else nullcontext(),
        ):
            losses = self.model.losses(tokens, labels, positions=positions, packed=packed, dispatcher=self.dispatcher)
        with self.exchange.watching(starts=False) if self.exchange is not None else nullcontext():
            return backward(self.objective.parts(losses, inputs), balance)

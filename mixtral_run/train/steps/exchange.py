"""The exchange of gradients while the last backward pass of a step runs, in jobs of data parallelism alone.

Autograd finishes the layers from the last to the first. Consecutive layers form a stage. When the gradients of a stage
are complete they are put into one flat buffer for each dtype, and become views of it, so that later micro batches add
to the buffer, the sum over the ranks is taken in place, and nothing is copied back. The sum of a stage begins while the
pass still computes the stages below.

In an eager pass hooks start the sums. In a pass that is captured as a CUDA graph the hooks record an event for each
stage, and the host enqueues the sums, each behind its event, when it has launched the graph of the last micro batch. No
sum is part of a graph, so the same graph serves all micro batches.

All ranks call the same sums in the same order: stages always follow each other, and the end of the pass starts those
that are left, such as one in which a parameter of this rank got no gradient.

Why data parallelism alone (`policy.why_sums_follow`): the sums are the only collectives of GPUs between the begin and
the end of a pass, all of one communicator, in one order on all ranks. No kernel of the pass waits for another rank, nor
for programs of its own grid that have not started, so a sum that holds multiprocessors delays the pass and never stops
it. By induction over the sums each one is reached by all ranks and ends, whatever the host waits for in between. With
TP, EP or CP the pass has collectives of its own, and none of that holds: docs/concepts/scaling.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.planner import policy

STAGES = 16
"""About this many stages share the gradients. The sum of the last one cannot overlap the pass, and a sum of few bytes
takes as long as its latency."""
LEAST_BYTES = 4 * 1024**2
"""Smallest size of a stage. Smaller sums take no less time."""
MOST_BYTES = 256 * 1024**2
"""A stage of several layers is no larger: its flat buffer exists next to the gradients that it replaces."""
ALIGNMENT_BYTES = 128
"""Gradients start at a multiple of this in their flat buffer, so that kernels can read them in the widest words."""


@dataclass(frozen=True)
class Stage:
    """Consecutive layers, whose sums start together.

    lowest: number of the layer that the pass finishes last. parts: the parameters, those of one dtype together.
    """

    lowest: int
    parts: tuple[tuple[torch.nn.Parameter, ...], ...]


@dataclass(frozen=True)
class Flat:
    """Gradients of a part. views: of the buffer, in the order of the parameters."""

    buffer: Tensor
    views: tuple[Tensor, ...]

    @classmethod
    def of(cls, parameters: Sequence[torch.nn.Parameter]) -> Flat:
        """Copy the gradients of parameters into a new buffer, with zeros for missing ones."""
        first = parameters[0]
        step = ALIGNMENT_BYTES // first.element_size()
        sizes = [-(-each.numel() // step) * step for each in parameters]
        missing = [each for each in parameters if each.grad is None]
        has_gaps = missing or sum(sizes) != sum(each.numel() for each in parameters)
        buffer = (torch.zeros if has_gaps else torch.empty)(sum(sizes), dtype=first.dtype, device=first.device)
        views = tuple(
            piece[: each.numel()].view(each.shape) for each, piece in zip(parameters, buffer.split(sizes), strict=True)
        )
        found = [(view, each.grad) for view, each in zip(views, parameters, strict=True) if each.grad is not None]
        if found:
            torch._foreach_copy_([view for view, _ in found], [gradient for _, gradient in found])
        return cls(buffer, views)

    def holds(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Return True if the gradients of the parameters are the views of this buffer."""
        return all(each.grad is view for each, view in zip(parameters, self.views, strict=True))


class GradientExchange:
    """Sums of a model's gradients over all ranks, which overlap the backward pass. One object for a run.

    Attributes:
        flats: the gradients of each stage; None for a stage that has none yet. A captured pass sets those of its graph.
        is_last: True if the sums may start in the pass that comes next, because it is the step's last one.
    """

    def __init__(self, model: MixtralModel) -> None:
        self._device, self._group = model.mesh.device, model.mesh.data_group
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        layers = {each: layer_of(name, model.architecture.num_layers) for name, each in named}
        self.stages = stages_of(layers)
        self.flats: list[tuple[Flat, ...] | None] = [None] * len(self.stages)
        self.is_last = False
        self._works: list[dist.Work] = []
        self._watches = self._starts = False
        # Next stage to be complete, and to be summed.
        self._next = self._next_sum = 0
        self._events: list[torch.cuda.Event] = []
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._events = [torch.cuda.Event(external=True) for _ in self.stages]
            self._stream = torch.cuda.Stream(self._device)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, layer=layer: self._reached(layer))
            for parameter, layer in layers.items()
        ]

    def close(self) -> None:
        """Take the hooks off the model, and release the flat buffers."""
        for hook in self._hooks:
            hook.remove()
        self.begin_step()

    def begin_step(self) -> None:
        """Release the flat buffers of the step before: its gradients are not needed any more."""
        self.flats = [None] * len(self.stages)

    def begin_pass(self, *, is_last: bool) -> None:
        """Prepare for a pass of a step. is_last: no other pass of the step adds to the gradients."""
        self.is_last, self._next_sum = is_last, 0

    @contextmanager
    def watching(self, *, starts: bool) -> Iterator[None]:
        """Put gradients into flat buffers while the pass within computes them.

        starts: start the sum of each stage as soon as it is complete. All ranks must enter with the same value.
        """
        self._next, self._watches, self._starts = 0, True, starts
        try:
            yield
            # The pass reaches no layer below the first one.
            self._complete_above(-2)
        finally:
            self._watches = False

    def start_all(self) -> None:
        """Start the sums that have not been started, each behind the event of its stage. All ranks must call."""
        while self._next_sum < len(self.stages):
            self._start_next()

    def wait(self) -> None:
        """Let the current stream, or the host without a GPU, wait for the sums of the step."""
        assert self._next_sum == len(self.stages), "the last pass of a step starts all sums"
        for work in self._works:
            work.wait()
        self._works.clear()

    def _reached(self, layer: int) -> None:
        if self._watches:
            assert self._next == 0 or layer < self.stages[self._next - 1].lowest, (
                f"a gradient of layer {layer} arrived after those of its stage had been taken as complete"
            )
            self._complete_above(layer)

    def _complete_above(self, layer: int) -> None:
        """Take the stages as complete that end above a layer.

        A layer's first gradient shows that the layers above have all of theirs: autograd begins with a layer when the
        gradient of its output is complete, and adds to parameters before anything else. That a parameter has got a
        gradient would not show it: where experts run in chunks, a parameter gets several.
        """
        while self._next < len(self.stages) and self.stages[self._next].lowest > layer:
            number = self._next
            self._next += 1
            self._fill(number, self.stages[number])
            if self._events:
                self._events[number].record()
            if self._starts:
                self._start_next()

    @torch.no_grad()
    def _fill(self, number: int, stage: Stage) -> None:
        flats = self.flats[number]
        if flats is not None and all(flat.holds(part) for flat, part in zip(flats, stage.parts, strict=True)):
            return
        self.flats[number] = flats = tuple(Flat.of(part) for part in stage.parts)
        for flat, part in zip(flats, stage.parts, strict=True):
            for view, parameter in zip(flat.views, part, strict=True):
                parameter.grad = view

    def _start_next(self) -> None:
        number = self._next_sum
        self._next_sum += 1
        flats = self.flats[number]
        assert flats is not None, "the sums of a stage start when it has gradients"
        with self._behind(number):
            for flat in flats:
                work = dist.all_reduce(flat.buffer, group=self._group, async_op=True)
                assert work is not None
                self._works.append(work)

    def _behind(self, number: int) -> AbstractContextManager[object]:
        """Return a context in which collectives wait for the event of a stage only."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_event(self._events[number])
        return torch.cuda.stream(self._stream)


def open_exchange(model: MixtralModel) -> GradientExchange | None:
    """Return the exchange for a run; None if gradients are summed after the pass, or there is nothing to sum.

    The same on all ranks.
    """
    if model.mesh.world_size == 1 or _why_sums_follow(model) is not None:
        return None
    return GradientExchange(model)


def describe_exchange(model: MixtralModel, exchange: GradientExchange | None) -> str | None:
    """Return when the gradients of a run are summed, and why not earlier, for its log; None for a job of one rank."""
    mesh = model.mesh
    if mesh.world_size == 1:
        return None
    if exchange is not None:
        return f"Gradients are summed during the backward pass, in {len(exchange.stages)} stages"
    return f"Gradients are summed after the backward pass: {_why_sums_follow(model)}"


def _why_sums_follow(model: MixtralModel) -> str | None:
    mesh: Mesh = model.mesh
    return policy.why_sums_follow(
        mesh.tensor_size, mesh.expert_size, mesh.context_size, trains_all=model.settings.lora is None
    )


def layer_of(name: str, num_layers: int) -> int:
    """Return the number of a parameter's layer: -1 for the embedding, `num_layers` for what follows the last layer."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    if found is not None:
        return int(found[1])
    return -1 if "embedding" in name else num_layers


def stages_of(layers: dict[torch.nn.Parameter, int]) -> list[Stage]:
    """Return the stages of parameters, given with their layers, in the order in which a backward pass finishes them."""
    total = sum(_bytes_of(each) for each in layers)
    limit = min(max(total / STAGES, LEAST_BYTES), MOST_BYTES)
    stages: list[Stage] = []
    waiting: list[torch.nn.Parameter] = []
    for number in sorted(set(layers.values()), reverse=True):
        own = [each for each, layer in layers.items() if layer == number]
        if waiting and sum(map(_bytes_of, waiting + own)) > MOST_BYTES:
            stages.append(Stage(number + 1, _parts_of(waiting)))
            waiting = []
        waiting += own
        if sum(map(_bytes_of, waiting)) >= limit:
            stages.append(Stage(number, _parts_of(waiting)))
            waiting = []
    if waiting:
        stages.append(Stage(min(layers.values()), _parts_of(waiting)))
    return stages


def _parts_of(parameters: Sequence[torch.nn.Parameter]) -> tuple[tuple[torch.nn.Parameter, ...], ...]:
    kinds = dict.fromkeys(each.dtype for each in parameters)
    return tuple(tuple(each for each in parameters if each.dtype == kind) for kind in kinds)


def _bytes_of(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()

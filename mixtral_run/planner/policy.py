"""Policy of execution: which token dispatch a pass through the model uses, whether it is captured as a CUDA graph, and
whether gradients are summed while it runs.

The planner asks before a run, `train/steps/cuda_graph.py` and `inference/decode.py` ask during it. Both use these
functions, so that the plan promises what the run does. Pure arithmetic on sizes and the GPU's compute capability.

Capture requires that nothing in the pass waits for the GPU. Two parts may wait:

    grouped products   without a set of kernels (model/kernels/requirements.py) the host reads the experts' offsets:
                       below compute capability 8.0, and in other dtypes than bf16
    all-to-all         each rank must learn on the host how many rows arrive

Passes whose experts compute in chunks (model/routing/expert_chunks.py) are not captured either: they are long enough
for the GPU not to wait for the host.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mixtral_run.config.launch import layout_name
from mixtral_run.config.recompute import RUNS_AGAIN
from mixtral_run.model.dispatch import capacity
from mixtral_run.model.kernels.requirements import (
    EIGHT_BIT_CAPABILITY,
    Capability,
    KernelSet,
    grouped_mm_runs_on_device,
    kernel_set_of,
)

MIN_TOKENS_TO_CAPTURE_DECODING = 8
"""New tokens of each sequence from which capturing pays; it takes as long as two or three passes."""


class Dispatch(enum.Enum):
    """An exchange that brings tokens to the ranks of their experts, and the results back."""

    LOCAL = "local"
    """Every rank holds all experts."""
    ALL_TO_ALL = "all_to_all"
    """Each row is sent to its expert's rank. The host waits for the row counts."""
    ALL_GATHER = "all_gather"
    """Every rank of the expert group gets all tokens of the group (model/dispatch/all_gather.py)."""
    SYMMETRIC_MEMORY = "symmetric_memory"
    """GPUs read the rows that they need from each other's memory (model/dispatch/symmetric_memory.py)."""

    @property
    def has_fixed_shapes(self) -> bool:
        """True if the expert group exchanges tokens without the host, in buffers of a fixed capacity."""
        return self in (Dispatch.ALL_GATHER, Dispatch.SYMMETRIC_MEMORY)


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """The properties of a training pass over one micro batch that decide how it runs.

    Attributes:
        tokens: tokens of the micro batch on one rank; with sequence parallelism, of one tensor-parallel rank.
        expert_size: ranks in an expert group.
        recompute: one of `RECOMPUTE`.
        lora_dropout: None if all weights are trained.
        fused_experts: True if both layers of the experts have adapters and no dropout (model/adapters/lora_experts.py).
        syncs_with_host: True if the experts' products wait for the GPU (`products_sync_with_host`).
        peer_access: True if the GPUs of an expert group can read each other's memory, and have memory for it.
        expert_chunks: chunks of the tokens that the experts compute one after the other.
    """

    tokens: int
    expert_size: int
    recompute: str
    lora_dropout: float | None
    fused_experts: bool
    syncs_with_host: bool
    peer_access: bool
    expert_chunks: int = 1


@dataclass(frozen=True)
class Execution:
    """The dispatch of a pass. captured: True if the pass is captured as a CUDA graph and replayed."""

    dispatch: Dispatch
    captured: bool


def execution_of(training: TrainingPass) -> Execution:
    """Return the dispatch of a training pass, and whether it can be captured. All ranks get the same answer."""
    dispatch = _dispatch_of(training)
    # Layers that run again read the state of the random number generator if there is dropout.
    recomputes = training.recompute in RUNS_AGAIN
    captured = (
        not training.syncs_with_host
        and dispatch is not Dispatch.ALL_TO_ALL
        and training.expert_chunks == 1
        and (not recomputes or (training.recompute != "offload" and training.lora_dropout == 0))
    )
    return Execution(dispatch, captured)


def _dispatch_of(training: TrainingPass) -> Dispatch:
    if training.expert_size == 1:
        return Dispatch.LOCAL
    if training.fused_experts and not training.syncs_with_host:
        if training.peer_access and capacity.pays(training.tokens, training.expert_size, read=True):
            return Dispatch.SYMMETRIC_MEMORY
        if capacity.pays(training.tokens, training.expert_size, read=False):
            return Dispatch.ALL_GATHER
    return Dispatch.ALL_TO_ALL


def decoding_dispatch(tokens: int, expert_size: int) -> Dispatch:
    """Return the dispatch of a pass of generation. tokens: of each rank. Symmetric memory is not set up for it."""
    if expert_size == 1:
        return Dispatch.LOCAL
    return Dispatch.ALL_GATHER if capacity.pays(tokens, expert_size, read=False) else Dispatch.ALL_TO_ALL


def captures_decoding(num_rows: int, expert_size: int, new_tokens: int, *, syncs_with_host: bool) -> bool:
    """Return True if the pass over one more token of each of `num_rows` sequences is captured."""
    return (
        decoding_dispatch(num_rows, expert_size) is not Dispatch.ALL_TO_ALL
        and not syncs_with_host
        and new_tokens >= MIN_TOKENS_TO_CAPTURE_DECODING
    )


def products_sync_with_host(
    capability: Capability | None, element_bytes: int, *widths: int, kernels: str = "auto"
) -> bool:
    """Return True if the experts' products wait for the GPU, as they also do on a CPU.

    Args:
        capability: compute capability of the GPU; None on a CPU.
        element_bytes: bytes of an element of activations and unquantized weights.
        widths: hidden size, ffn hidden size, and the adapters' rank.
        kernels: a value of --kernels.
    """
    return not grouped_mm_runs_on_device(kernel_set_of(capability, kernels), element_bytes, *widths)


def multiplies_in_8_bit(capability: Capability, kernels: str = "auto") -> bool:
    """Return True if the products with experts in fp8 are 8-bit products, which need no copy of them in 16 bit."""
    return capability == EIGHT_BIT_CAPABILITY and kernel_set_of(capability, kernels) is KernelSet.HOPPER


def has_peer_access(expert_size: int, num_gpus: int, gpus_per_host: int) -> bool:
    """Return True if the GPUs of each expert group can read each other's memory as far as sizes tell: they are in one
    host.

    Whether the driver allows it is known only in the run (`open_symmetric_memory` in
    model/dispatch/symmetric_memory.py).
    """
    return num_gpus <= gpus_per_host or gpus_per_host % expert_size == 0


def why_sums_follow(tensor_size: int, expert_size: int, context_size: int, *, trains_all: bool = False) -> str | None:
    """Return why gradients are summed over ranks after the last backward pass of a step; None if they are summed while
    it runs.

    Only data parallelism alone is known to be safe: with any other parallelism the pass has collectives of its own, and
    those of two communicators can wait for each other (docs/concepts/scaling.md).

    trains_all: True for training of all weights, which has no memory to spare for buffers of gradients.
    """
    if trains_all:
        return "all weights are trained"
    if tensor_size * expert_size * context_size == 1:
        return None
    return f"the pass has collectives of its own under {layout_name(tensor_size, expert_size, context_size)}"

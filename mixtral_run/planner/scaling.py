"""Cost of several hosts: bytes and seconds of the exchange of adapter gradients. Standard library and sizes only.

Data parallelism runs over the hosts, tensor and expert parallelism inside each host, so that only gradients travel over
the network, once for each optimizer step: with data parallelism alone while its last backward pass runs
(train/steps/exchange.py), in other layouts after it. A ring all-reduce over R ranks sends 2 (R - 1) / R times the data.
A ring leaves each host once, however many of its ranks the host has.

The exchange is computed, not measured: docs/concepts/scaling.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mixtral_run.config.lora import shares_expert_adapters
from mixtral_run.planner import policy
from mixtral_run.planner.workload import Layout, Workload, adapter_parameters, trained_also_parameters

GRADIENT_BYTES = 4
"""Gradients of adapters are fp32."""
NETWORK_EFFICIENCY = 0.8
"""Part of a network's rate that an all-reduce of large buckets reaches. Assumed, not measured."""
BACKWARD_SHARE = 0.5
"""Part of a micro batch's time that the backward pass takes. Frozen weights have no gradients of their own: forward and
backward pass have the same products."""
LAST_SHARE = 1 / 16
"""Part of the exchange that begins when the backward pass ends: its last stage (STAGES in train/steps/exchange.py)."""
SLOWED = 1.7
"""Time of a backward pass during an exchange, relative to one alone. The experts' products, 65 % of the pass, give each
multiprocessor a fixed part of their tiles, and need all of it: next to a kernel that holds 2 to 32 multiprocessors they
take 1.4 to 1.75 times as long, dense products 1.2 to 1.5 times (measured on one H200)."""
EXPERT_MODULES = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Exchange:
    """Sum of the adapter gradients of one optimizer step over all hosts.

    Attributes:
        host_bytes: bytes that each host sends, and receives, over the network.
        seconds: at the rate of the network times NETWORK_EFFICIENCY.
        late_seconds: the part of them that no backward pass hides.
    """

    hosts: int
    host_bytes: float
    seconds: float
    late_seconds: float

    def speed(self, compute_seconds: float, micro_batches: int, *, overlapped: bool = False) -> float:
        """Return the part of the speed of one host that each host keeps, from 0 to 1.

        Args:
            compute_seconds: of one micro batch, without the exchange. Tokens reach the experts in the same way on one
                host and on several.
            micro_batches: of each rank in an optimizer step; the exchange belongs to the last one.
            overlapped: True for the exchange of training, which runs while the last backward pass runs where the layout
                allows it. False for one that follows the pass.
        """
        added = self.added_seconds(BACKWARD_SHARE * compute_seconds) if overlapped else self.seconds
        return compute_seconds * micro_batches / (compute_seconds * micro_batches + added)

    def added_seconds(self, backward_seconds: float) -> float:
        """Return by how much the exchange prolongs a step whose last backward pass takes so long alone."""
        if self.seconds == 0:
            return 0.0
        beside = self.seconds - self.late_seconds
        # The network limits, from the end of the first stage; or the pass does, which is slowed down by the exchange.
        network = LAST_SHARE * backward_seconds + beside
        compute = backward_seconds + beside * (1 - 1 / SLOWED)
        return max(network, compute) - backward_seconds + self.late_seconds


def exchange(workload: Workload, layout: Layout, hosts: int, network: float) -> Exchange:
    """Return the exchange of a step over `hosts` hosts with `workload.gpus` GPUs each.

    network: bytes per second that a host can send, and receive at the same time.
    """
    if hosts == 1:
        return Exchange(1, 0.0, 0.0, 0.0)
    targets = workload.lora_target_modules
    experts = _parameters(workload, layout, tuple(name for name in targets if name in EXPERT_MODULES))
    dense = _dense(workload, layout)
    # A rank holds nothing of other ranks' experts, unless the experts share their adapters.
    spread = 1 if shares_expert_adapters(workload) else layout.expert_model_parallel_size
    ranks = workload.gpus * hosts
    sent = 0.0
    # Each part of the model has a ring of its own, through all ranks that hold this part.
    for parameters, parts in ((experts, spread), (dense, layout.tensor_model_parallel_size)):
        sent += parts * parameters * _ring_bytes(ranks // parts)
    late = sent
    if why_sums_follow(layout) is None:
        # The pass ends with the embedding, which is a stage of its own.
        embedding = dataclasses.replace(workload, train_also=tuple({*workload.train_also} & {"embeddings"}))
        last = max(trained_also_parameters(embedding, layout), LAST_SHARE * dense)
        late = (LAST_SHARE * experts + last) * _ring_bytes(ranks)
    rate = network * NETWORK_EFFICIENCY
    return Exchange(hosts, sent, sent / rate, late / rate)


def why_sums_follow(layout: Layout) -> str | None:
    """Return why training sums gradients after the backward pass in a layout; None if it does while the pass runs."""
    return policy.why_sums_follow(
        layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.context_parallel_size
    )


def _ring_bytes(members: int) -> float:
    """Return the bytes that a ring all-reduce sends for each parameter."""
    return GRADIENT_BYTES * 2 * (members - 1) / members


def _dense(workload: Workload, layout: Layout) -> float:
    modules = tuple(name for name in workload.lora_target_modules if name not in EXPERT_MODULES)
    return _parameters(workload, layout, modules) + trained_also_parameters(workload, layout)


def _parameters(workload: Workload, layout: Layout, modules: tuple[str, ...]) -> float:
    return adapter_parameters(dataclasses.replace(workload, lora_target_modules=modules), layout)


def shown_hosts(most: int) -> list[int]:
    """Return 1, 2, 4, … and `most`."""
    powers = [1 << power for power in range(most.bit_length())]
    return [*(each for each in powers if each < most), most]

"""Cost of several hosts: bytes and seconds of the exchange of adapter gradients. Standard library and sizes only.

Data parallelism runs over the hosts, tensor and expert parallelism inside each host, so that only gradients travel over
the network, once for each optimizer step (`sum_gradients` in train/steps/step.py). A ring all-reduce over R ranks sends
2 (R - 1) / R times the data. A ring leaves each host once, however many of its ranks the host has.

The exchange is computed, not measured: docs/concepts/scaling.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mixtral_run.config.lora import shares_expert_adapters
from mixtral_run.planner.workload import Layout, Workload, adapter_parameters, trained_also_parameters

GRADIENT_BYTES = 4
"""Gradients of adapters are fp32."""
NETWORK_EFFICIENCY = 0.8
"""Part of a network's rate that an all-reduce of large buckets reaches. Assumed, not measured."""
BACKWARD_SHARE = 0.5
"""Part of a micro batch's time that the backward pass takes. Frozen weights have no gradients of their own: forward and
backward pass have the same products."""
EXPERT_MODULES = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Exchange:
    """Sum of the adapter gradients of one optimizer step over all hosts.

    Attributes:
        host_bytes: bytes that each host sends, and receives, over the network.
        seconds: at the rate of the network times NETWORK_EFFICIENCY.
    """

    hosts: int
    host_bytes: float
    seconds: float

    def speed(
        self, alone_seconds: float, compute_seconds: float, micro_batches: int, *, overlapped: bool = False
    ) -> float:
        """Return the part of the speed of one host that each host keeps, from 0 to 1.

        Args:
            alone_seconds: of one micro batch on one host.
            compute_seconds: of one micro batch on each of the hosts, without the exchange.
            micro_batches: of each rank in an optimizer step; the exchange follows the last one.
            overlapped: True for the limit of an exchange that runs while the last backward pass runs. Training does not
                do that today.
        """
        hidden = min(self.seconds, BACKWARD_SHARE * compute_seconds) if overlapped else 0.0
        return alone_seconds * micro_batches / (compute_seconds * micro_batches + self.seconds - hidden)


def exchange(workload: Workload, layout: Layout, hosts: int, network: float) -> Exchange:
    """Return the exchange of a step over `hosts` hosts with `workload.gpus` GPUs each.

    network: bytes per second that a host can send, and receive at the same time.
    """
    if hosts == 1:
        return Exchange(1, 0.0, 0.0)
    targets = workload.lora_target_modules
    experts = _parameters(workload, layout, tuple(name for name in targets if name in EXPERT_MODULES))
    dense = _parameters(workload, layout, tuple(name for name in targets if name not in EXPERT_MODULES))
    dense += trained_also_parameters(workload, layout)
    ranks = workload.gpus * hosts
    sent = 0.0
    for parameters, parts in (
        # What the experts share, all ranks hold.
        (experts, 1 if shares_expert_adapters(workload) else layout.expert_model_parallel_size),
        (dense, layout.tensor_model_parallel_size),
    ):
        # Each part of the model has a ring of its own, through all ranks that hold this part.
        members = ranks // parts
        sent += parts * parameters * GRADIENT_BYTES * 2 * (members - 1) / members
    return Exchange(hosts, sent, sent / (network * NETWORK_EFFICIENCY))


def _parameters(workload: Workload, layout: Layout, modules: tuple[str, ...]) -> float:
    return adapter_parameters(dataclasses.replace(workload, lora_target_modules=modules), layout)


def shown_hosts(most: int) -> list[int]:
    """Return 1, 2, 4, … and `most`."""
    powers = [1 << power for power in range(most.bit_length())]
    return [*(each for each in powers if each < most), most]

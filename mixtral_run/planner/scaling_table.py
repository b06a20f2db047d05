"""`mixtral-run plan --hosts N`: what the exchange of gradients over the network costs, as a table and as values."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.verbs.plan import DEFAULT_NETWORK, PlanConfig, network_bytes
from mixtral_run.planner.ranking import Choice, rate_by_tokens
from mixtral_run.planner.scaling import NETWORK_EFFICIENCY, exchange, shown_hosts, why_sums_follow
from mixtral_run.planner.workload import Workload
from mixtral_run.terminal.report import Report

MEASURED_RATES = {
    ("h200", "bf16"): 9727.0, ("h200", "fp8"): 13652.0, ("h200", "nf4"): 5793.0, ("h100", "fp8"): 11644.0
}  # fmt: skip
"""Tokens per second of one GPU at 2,048 x 1 without recomputation, from docs/benchmarks.md, by --gpu and
--base-precision."""
ATTENTION_SAVES = 3.7e-6
"""Seconds of a token that --attention-precision fp8 saves on H200, from docs/benchmarks.md."""
MICRO_BATCHES = (1, 8)
"""Micro batches of each rank in a step, for which the table has columns."""


@dataclass(frozen=True)
class HostsRow:
    """A number of hosts. The speeds are parts of the speed of a host alone, for each of MICRO_BATCHES.

    speeds: if the exchange followed the backward pass. speeds_if_overlapped: expected of training, which exchanges
    gradients while the last backward pass of a step runs where the layout allows it; elsewhere the same as `speeds`.
    """

    hosts: int
    gpus: int
    host_bytes: float
    exchange_seconds: float
    speeds: tuple[float, ...]
    speeds_if_overlapped: tuple[float, ...]


@dataclass(frozen=True)
class Scaling:
    """Hosts in a row, for the best layout of a plan.

    Attributes:
        tokens_per_second: of a GPU on one host; None if nothing is known about the GPU. The rows then have no speeds.
        rate_source: "flag", "benchmarks" or "unknown".
        micro_batch_seconds: of one host; None without tokens_per_second.
    """

    network_bytes_per_second: float
    network_efficiency: float
    tokens_per_second: float | None
    rate_source: str
    micro_batch_seconds: float | None
    rows: tuple[HostsRow, ...]


def scaling(config: PlanConfig, workload: Workload, best: Choice) -> Scaling:
    """Return what 1, 2, 4, … and config.hosts hosts cost and give."""
    network = network_bytes(config.network or DEFAULT_NETWORK)
    rate, source = config.tokens_per_second, "flag"
    if rate is None:
        measured = MEASURED_RATES.get((config.gpu or "", config.base_precision))
        source = "benchmarks" if measured is not None else "unknown"
        if measured is not None and config.attention_precision == "fp8":
            measured = 1 / (1 / measured - ATTENTION_SAVES)
        rate = (
            measured * best.relative_speed * rate_by_tokens(workload.tokens(best.layout))
            if measured is not None
            else None
        )
    seconds = workload.tokens(best.layout) / best.layout.tensor_model_parallel_size / rate if rate is not None else None
    rows = tuple(_row(config, workload, best, hosts, network, seconds) for hosts in shown_hosts(config.hosts))
    return Scaling(network, NETWORK_EFFICIENCY, rate, source, seconds, rows)


def _row(
    config: PlanConfig, workload: Workload, best: Choice, hosts: int, network: float, seconds: float | None
) -> HostsRow:
    """Return one number of hosts. seconds: of a micro batch on one host; None if it is not known."""
    found = exchange(workload, best.layout, hosts, network)
    gpus = hosts * config.gpus
    if seconds is None:
        return HostsRow(hosts, gpus, found.host_bytes, found.seconds, (), ())
    speeds, overlapped = (
        tuple(found.speed(seconds, count, overlapped=each) for count in MICRO_BATCHES) for each in (False, True)
    )
    return HostsRow(hosts, gpus, found.host_bytes, found.seconds, speeds, overlapped)


def show_scaling(config: PlanConfig, workload: Workload, best: Choice) -> None:
    """Print the table of hosts, and which of its figures are measured, computed and assumed."""
    found = scaling(config, workload, best)
    why = why_sums_follow(best.layout)
    columns = ("hosts", "GPUs", "GB a host sends", "exchange ms")
    speeds = tuple(f"speed, {count} micro batch{'es' if count > 1 else ''}" for count in MICRO_BATCHES)
    cells = [
        (
            str(row.hosts), str(row.gpus), f"{row.host_bytes / 1e9:.2f}", f"{row.exchange_seconds * 1e3:.1f}",
            *(
                f"{speed:.0%} ({expected:.0%})" if why is None else f"{speed:.0%}"
                for speed, expected in zip(row.speeds, row.speeds_if_overlapped, strict=True)
            ),
        )
        for row in found.rows
    ]  # fmt: skip
    report = Report()
    report.table(
        (*columns, *speeds) if found.micro_batch_seconds is not None else columns,
        cells,
        f"{best.layout} inside each host, data parallel over hosts, {config.network or DEFAULT_NETWORK} a host",
    )
    report.say(
        f"exchange: computed from the adapter's size, at an assumed {NETWORK_EFFICIENCY:.0%} of the network's rate; "
        "not measured"
    )
    if found.micro_batch_seconds is None:
        report.say(
            "speed: nothing is known about this GPU; give --tokens-per-second, as finetune reports it on one host"
        )
        return
    origin = "given" if found.rate_source == "flag" else "measured on one GPU, times the estimated speed of the layout"
    how = f"the exchange follows the backward pass, because {why}"
    if why is None:
        how = (
            "if the exchange followed the backward pass; in brackets as training does it, during the last backward pass"
        )
    report.say(
        f"speed: of a host among them, relative to one alone, by the micro batches of a step; {how}; computed, not "
        "measured"
    )
    report.say(f"one host: {found.tokens_per_second:,.0f} tokens a second and GPU, {origin}")

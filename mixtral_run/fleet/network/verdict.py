"""Which pairs of hosts are measured at the same time, and what their figures say. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEAST_PART = 0.5
"""A pair is slow below this part of the best pair's bandwidth."""
DIRECT, SOCKETS = "GDRDMA", "Socket"


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """Figures of one pair of hosts. gb_per_second: bus bandwidth of an all-reduce; None if `error` says why not."""

    hosts: tuple[str, str]
    gb_per_second: float | None = None
    backend: str = ""
    transports: Mapping[str, int] = field(default_factory=dict)
    """Connections of NCCL between the hosts by kind, such as IB/GDRDMA, IB and Socket."""
    error: str = ""

    @property
    def name(self) -> str:
        return " – ".join(self.hosts)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the figures of all pairs say. remarks: by the name of the pair. problems: worth a failure."""

    remarks: Mapping[str, str]
    problems: tuple[str, ...]


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return all pairs of hosts in rounds, in which each host is in one pair at most: n-1 rounds for an even n."""
    places: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(one, other) for one, other in pairs if one is not None and other is not None])
        # The first place stays, and the others move on by one.
        places = [places[0], places[-1], *places[1:-1]]
    return found


def judge(results: Sequence[PairResult], rdma: Mapping[str, Sequence[str]], floor: float | None) -> Verdict:
    """Return what is slow, failed, or does not use the devices that both hosts have.

    Args:
        results: all pairs.
        rdma: names of the active RDMA devices by host.
        floor: least bandwidth in GB/s, or None for a part of the best pair's.
    """
    rates = [each.gb_per_second for each in results if each.gb_per_second is not None]
    best = max(rates, default=0.0)
    least = max(floor or 0.0, LEAST_PART * best)
    why = f"expected at least {least:.4g} GB/s" + (
        "" if floor is not None and least == floor else f", half of the best pair's {best:.4g}"
    )
    bad = {
        each.name: each.error or f"{each.gb_per_second:.4g} GB/s; {why}"
        for each in results
        if each.gb_per_second is None or each.gb_per_second < least
    }
    hosts = _bad_hosts(results, bad)
    problems = [f"{host}: slow or failing with every other host; look at its card, cable and port" for host in hosts]
    problems += [
        f"{each.name}: {bad[each.name]}" for each in results if each.name in bad and not set(each.hosts) & set(hosts)
    ]
    remarks = dict(bad)
    for each in results:
        words = _fallback(each, rdma)
        if words:
            problems.append(f"{each.name}: {words}")
            remarks[each.name] = "; ".join(filter(None, (remarks.get(each.name), words)))
    return Verdict(remarks=remarks, problems=tuple(problems))


def _bad_hosts(results: Sequence[PairResult], bad: Mapping[str, str]) -> list[str]:
    """Return the hosts whose pairs are all bad, if there are several pairs of each and other pairs are good."""
    pairs: dict[str, list[str]] = {}
    for each in results:
        for host in each.hosts:
            pairs.setdefault(host, []).append(each.name)
    if len(bad) == len(results):
        return []
    return [host for host, names in pairs.items() if len(names) > 1 and all(name in bad for name in names)]


def _fallback(result: PairResult, rdma: Mapping[str, Sequence[str]]) -> str:
    """Return what is wrong with the transport of NCCL on hosts that have RDMA devices; empty if nothing is."""
    if result.backend != "nccl" or not result.transports or not all(rdma.get(host) for host in result.hosts):
        return ""
    if any(SOCKETS in kind for kind in result.transports):
        devices = "; ".join(f"{host}: {', '.join(rdma[host])}" for host in result.hosts)
        return (
            f"NCCL fell back to sockets, although both hosts have RDMA devices ({devices}); the image needs "
            "libibverbs1 and ibverbs-providers, and the user the right to use /dev/infiniband"
        )
    if not any(DIRECT in kind for kind in result.transports):
        return "RDMA without GPUDirect: neither DMA-BUF nor nvidia-peermem is in use"
    return ""

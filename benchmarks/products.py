"""The experts' frozen products of one layer alone: torch's grouped product beside the kit's own, Mixtral's sizes, bf16.

    python -m benchmarks.products [--rows 128,256,512,1024,2048]

Forward, and the rows' gradient with an adapter's part in the same sum (torch: added by a kernel behind it). Rows an
expert, evenly and unevenly over 8 experts. Each is recorded as a CUDA graph of several calls on weights of different
layers, so that nothing lies in the cache from before; medians of rounds in turns. Milliseconds a call; a row a case,
the last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixtral_run.model.kernels.grouped_mm import add_product
from mixtral_run.model.kernels.hopper_grouped_mm import grouped_product

SHARES = {"evenly": (1,) * 8, "unevenly": (6, 15, 10, 17, 12, 14, 11, 15)}
SIZES = {"linear_fc1": (28672, 4096), "linear_fc2": (4096, 14336)}
RANK = 16
LAYERS = 3
ROUNDS = 7


def captured(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Callable[[], float]:
    """Milliseconds of one call each time it is called."""
    for weight in weights:
        call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / len(weights)

    return once


def ways(rows: int, shares: Sequence[int], outputs: int, inputs: int, gradient: bool) -> dict[str, float]:
    counts = torch.tensor(shares) * rows * 8 // sum(shares)
    counts[-1] += rows * 8 - counts.sum()
    offsets = counts.cumsum(0).int().cuda()
    weights = [torch.randn(8, outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
    left = torch.randn(rows * 8, outputs if gradient else inputs, device="cuda", dtype=torch.bfloat16)
    inner = torch.randn(rows * 8, RANK, device="cuda", dtype=torch.bfloat16)
    half = torch.randn(8, RANK, inputs, device="cuda", dtype=torch.bfloat16)

    def torchs(weight: Tensor) -> Tensor:
        if not gradient:
            return torch._grouped_mm(left, weight.transpose(1, 2), offs=offsets)
        return add_product(torch._grouped_mm(left, weight, offs=offsets), inner, half, 1.0, offsets)

    def ours(weight: Tensor) -> Tensor:
        return grouped_product(left, weight, offsets, (inner, half) if gradient else None, transposed=not gradient)

    timers = {"torch": captured(torchs, weights), "ours": captured(ours, weights)}
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            found[name].append(timer())
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="128,256,512,1024,2048", help="an expert, on average")
    results = []
    for rows in map(int, parser.parse_args().rows.split(",")):
        for routing, shares in SHARES.items():
            for layer, (outputs, inputs) in SIZES.items():
                for gradient in (False, True):
                    case = {"rows": rows, "routing": routing, "product": layer, "gradient": gradient}
                    times = ways(rows, shares, outputs, inputs, gradient)
                    results.append(case | times)
                    what = f"{rows:5} {routing:9} {layer} {'gradient' if gradient else 'forward ':9}"
                    print(what, "  ".join(f"{name} {value:.3f}" for name, value in times.items()), flush=True)
                    torch.cuda.empty_cache()
    print(json.dumps(results))


if __name__ == "__main__":
    main()

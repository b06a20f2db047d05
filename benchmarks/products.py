"""The experts' frozen products of one layer alone: torch's grouped product, the kit's own for Hopper and the portable
one, Mixtral's sizes, bf16.

    python -m benchmarks.products [--rows 128,256,512,1024,2048] [--sides torch,hopper,fp8,portable,nf4]
        [--tiles 128x256x64x8x4,…] [--before FOLDER]
    DISABLE_MMA_V3=1 python -m benchmarks.products --sides portable     # with the instructions that A100 has

A tile is ROWSxCOLUMNSxDEPTHxWARPSxSTAGES of the portable product; without --tiles it is the one that the kit takes.
With --before, hopper and fp8 are also timed as compiled from the csrc folder of another commit, in the same rounds, and
a row says so if the results differ in any bit.
Forward, and the rows' gradient with an adapter's part in the same sum (torch: added by a kernel behind it). Rows an
expert, evenly and unevenly over 8 experts. Each is recorded as a CUDA graph of several calls on weights of different
layers, so that nothing lies in the cache from before; medians of rounds in turns. Milliseconds a call; a row a case,
the last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mixtral_run.model.kernels.grouped_mm import add_product
from mixtral_run.model.kernels.portable_mm_triton import Tile
from mixtral_run.model.kernels.portable_mm_triton import grouped_product as portable_product
from mixtral_run.model.kernels.quantized.formats import FP8

SHARES = {"evenly": (1,) * 8, "unevenly": (6, 15, 10, 17, 12, 14, 11, 15)}
SIZES = {"linear_fc1": (28672, 4096), "linear_fc2": (4096, 14336)}
RANK = 16
LAYERS = 3
ROUNDS = 7


def captured(call: Callable[[Any], Tensor], weights: Sequence[Any]) -> Callable[[], float]:
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


@contextmanager
def other_source(folder: Path | None) -> Iterator[None]:
    """Within, Hopper's products are those of another commit's csrc folder."""
    if folder is None:
        yield
        return
    from mixtral_run.model.kernels import hopper_grouped_mm

    def kernels(device: torch.device, bits: int) -> Any:
        return hopper_grouped_mm.loaded(device, bits, folder)

    with patch.object(hopper_grouped_mm, "_kernels", kernels):
        yield


def random_codes(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Return experts in NF4: codes and scales."""
    codes = torch.randint(0, 256, (8, outputs, inputs // 2), device="cuda", dtype=torch.uint8)
    return codes, torch.rand(8, outputs, inputs // 64, device="cuda").bfloat16()


def ways(
    rows: int,
    shares: Sequence[int],
    outputs: int,
    inputs: int,
    gradient: bool,
    sides: Sequence[str],
    tiles: str,
    before: Path | None = None,
) -> dict[str, float]:
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

    def hoppers(weight: Tensor) -> Tensor:
        from mixtral_run.model.kernels.hopper_grouped_mm import grouped_product

        return grouped_product(left, weight, offsets, (inner, half) if gradient else None, transposed=not gradient)

    def portable(tile: Tile | None) -> Callable[[Tensor], Tensor]:
        def product(weight: Tensor) -> Tensor:
            matrices = weight if gradient else weight.transpose(1, 2)
            return portable_product(left, matrices, offsets, (inner, half) if gradient else None, tile=tile)

        return product

    def expanded(weight: tuple[Tensor, Tensor]) -> Tensor:
        from mixtral_run.model.kernels.quantized.nf4_triton import expand

        return portable(None)(expand(*weight))

    def in_8_bit(weight: Tensor) -> Tensor:
        from mixtral_run.model.kernels.hopper_grouped_mm import scaled_product

        adapter = (inner, half) if gradient else None
        return scaled_product(
            small, weight, row_scales, None if gradient else scales, offsets, adapter, transposed=not gradient
        )

    calls = {"torch": torchs, "hopper": hoppers, "portable": portable(None)}
    timers = {side: captured(calls[side], weights) for side in sides if side in calls}
    differing: list[str] = []

    def compare(name: str, call: Callable[[Tensor], Tensor], matrices: list[Tensor]) -> None:
        """Time the call with the source of another commit as well, if there is one."""
        if before is None:
            return
        now = call(matrices[0])
        with other_source(before):
            differing.extend([] if torch.equal(now, call(matrices[0])) else [name])
            timers[f"{name} before"] = captured(call, matrices)

    if "hopper" in sides:
        compare("hopper", hoppers, weights)
    if "fp8" in sides:
        small, row_scales = left.to(FP8), torch.rand(rows * 8, device="cuda")
        scales, in_bytes = torch.rand(8, outputs, device="cuda"), [each.to(FP8) for each in weights]
        timers["fp8"] = captured(in_8_bit, in_bytes)
        compare("fp8", in_8_bit, in_bytes)
    if "nf4" in sides:
        timers["nf4"] = captured(expanded, [random_codes(outputs, inputs) for _ in range(LAYERS)])
    for name in filter(None, tiles.split(",")):
        tile = Tile(*map(int, name.split("x")))
        try:
            timers[name] = captured(portable(tile), weights)
        except Exception as error:
            print(f"{name}: {type(error).__name__} {str(error)[:80]}")
    if differing:
        print("differs from before:", *differing)
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            found[name].append(timer())
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="128,256,512,1024,2048", help="an expert, on average")
    parser.add_argument("--sides", default="torch,hopper,portable")
    parser.add_argument("--tiles", default="")
    parser.add_argument("--before", type=Path, help="csrc folder of another commit")
    parser.add_argument("--routings", default=",".join(SHARES))
    arguments = parser.parse_args()
    results = []
    for rows in map(int, arguments.rows.split(",")):
        for routing in arguments.routings.split(","):
            shares = SHARES[routing]
            for layer, (outputs, inputs) in SIZES.items():
                for gradient in (False, True):
                    case = {"rows": rows, "routing": routing, "product": layer, "gradient": gradient}
                    sides = arguments.sides.split(",")
                    times = ways(rows, shares, outputs, inputs, gradient, sides, arguments.tiles, arguments.before)
                    results.append(case | times)
                    what = f"{rows:5} {routing:9} {layer} {'gradient' if gradient else 'forward ':9}"
                    print(what, "  ".join(f"{name} {value:.3f}" for name, value in times.items()), flush=True)
                    torch.cuda.empty_cache()
    print(json.dumps(results))


if __name__ == "__main__":
    main()

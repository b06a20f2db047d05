"""The experts' SwiGLU of one layer alone, with its adapter and without: Mixtral's sizes, bf16.

    python -m benchmarks.kernels.swiglu [--rows 4096] [--tiles 32x128x4,16x128x4:down,…] [--also FILE]

A tile is ROWSxCOLUMNSxWARPS, with :down behind it if neighboring programs have neighboring rows; without --tiles it is
the one that the kit takes. --also: another version of swiglu_triton.py, which is timed beside. Before a time is taken,
all results are compared with plain torch in float64. Each call follows a copy that writes its input in the order of the
rows, as the product before it does, so that the end of the input is in the cache and the rest is not. Rows evenly and
unevenly over 8 experts; medians of calls in turns, milliseconds, beside the floor by bytes at the rate of a large copy.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixtral_run.model.kernels import swiglu, swiglu_triton

SHARES = {"evenly": (1,) * 8, "unevenly": (6, 15, 10, 17, 12, 14, 11, 15)}
FFN, RANK, SCALE, CALLS = 14336, 16, 2.0, 24
SMALL = 3e-3
"""The relative error that rounding to bf16 leaves."""


T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """A version of swiglu_triton.py, and the tile to give it."""

    module: ModuleType
    tile: swiglu_triton.Tile | None = None


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    inner: Tensor
    outer: Tensor
    offsets: Tensor
    gradient: Tensor

    @staticmethod
    def random(rows: int, shares: tuple[int, ...], ffn: int = FFN) -> Inputs:
        counts = torch.tensor(shares) * rows // sum(shares)
        counts[-1] += rows - counts.sum()

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        halves = (draw(rows, RANK), draw(8, 2 * ffn, RANK) / 4)
        return Inputs(draw(rows, 2 * ffn), *halves, counts.cumsum(0).int().cuda(), draw(rows, ffn))

    def adapted(self) -> tuple[Any, ...]:
        return self.hidden, self.inner, self.outer, SCALE, self.offsets

    def alone(self) -> tuple[Any, ...]:
        return self.hidden, None, None, 1.0, self.offsets


def check(module: ModuleType, given: Inputs) -> str:
    """Compare with plain torch in float64; "" or what differs."""
    exact = (given.hidden.double(), given.inner.double(), given.outer.double(), SCALE, given.offsets)
    found = module.forward(*given.adapted())
    for_hidden, active, products = module.recomputing_backward(*given.adapted(), given.gradient)[:3]
    if not torch.equal(found, active):
        return "the backward pass recomputes something else"
    pairs = list(
        zip(
            (for_hidden, active, products),
            swiglu.recomputing_backward(*exact, given.gradient.double())[:3],
            strict=True,
        )
    )
    wide = given.hidden.double().requires_grad_(True)
    alone = swiglu.swiglu(wide)
    (slope,) = torch.autograd.grad(alone, wide, given.gradient.double())
    pairs += [(module.forward(*given.alone()), alone), (module.backward(*given.alone(), given.gradient), slope)]
    errors = [float((mine.double() - right).norm() / right.norm()) for mine, right in pairs]
    return "" if all(error < SMALL for error in errors) else f"errors {errors}"


def timed(calls: dict[str, Callable[[], object]], write: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds of each call, each behind `write`."""
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    # Meanwhile the host gets ahead: no launch is waited for between the events.
    torch.cuda._sleep(200_000_000)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            write()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def with_tile(tile: swiglu_triton.Tile | None, call: Callable[[], T]) -> T:
    """Call with this tile for both directions; None: those that the kit takes."""
    kept = (swiglu_triton.FORWARD, swiglu_triton.BACKWARD)
    if tile is not None:
        swiglu_triton.FORWARD = swiglu_triton.BACKWARD = tile
    try:
        return call()
    finally:
        swiglu_triton.FORWARD, swiglu_triton.BACKWARD = kept


def tile_of(name: str) -> swiglu_triton.Tile:
    sizes, _, order = name.partition(":")
    rows, columns, warps = map(int, sizes.split("x"))
    return swiglu_triton.Tile(rows, columns, warps, across=order != "down")


def other(file: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location("other_swiglu", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy."""
    source, target = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * 2**31 / (timed({"": lambda: target.copy_(source)}, lambda: None)[""] / 1e3)


def right(name: str, side: Side) -> bool:
    """Check small inputs of both routings; print what is wrong."""
    for shares in SHARES.values():
        try:
            wrong = with_tile(side.tile, functools.partial(check, side.module, Inputs.random(700, shares, 512)))
        except Exception as error:
            wrong = f"{type(error).__name__} {str(error)[:100]}"
        if wrong:
            print(f"{name}: {wrong}", flush=True)
            return False
    return True


def measure(sides: dict[str, Side], given: Inputs) -> dict[str, dict[str, float]]:
    """Milliseconds of each call by each side."""
    hidden, gradient = given.hidden.clone(), given.gradient.clone()

    def calls(call: Callable[[ModuleType], object]) -> dict[str, Callable[[], object]]:
        return {
            name: lambda side=side: with_tile(side.tile, lambda: call(side.module))  # type: ignore[misc]
            for name, side in sides.items()
        }

    return {
        "forward": timed(calls(lambda each: each.forward(*given.adapted())), lambda: given.hidden.copy_(hidden)),
        "backward": timed(
            calls(lambda each: each.recomputing_backward(*given.adapted(), given.gradient)),
            lambda: given.gradient.copy_(gradient),
        ),
        "alone": timed(calls(lambda each: each.forward(*given.alone())), lambda: given.hidden.copy_(hidden)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--tiles", default="")
    parser.add_argument("--also", default="")
    arguments = parser.parse_args()
    sides = {"ours": Side(swiglu_triton)}
    if arguments.also:
        sides["also"] = Side(other(arguments.also))
    sides |= {name: Side(swiglu_triton, tile_of(name)) for name in filter(None, arguments.tiles.split(","))}
    sides = {name: side for name, side in sides.items() if right(name, side)}
    rate = copy_rate()
    for routing, shares in SHARES.items():
        for what, times in measure(sides, Inputs.random(arguments.rows, shares)).items():
            floor = 2 * arguments.rows * FFN * (6 if what == "backward" else 3) / rate
            line = "  ".join(f"{name} {value:.3f}" for name, value in sorted(times.items(), key=lambda each: each[1]))
            print(f"{routing:9} {what:9} floor {1e3 * floor:.3f}  {line}", flush=True)


if __name__ == "__main__":
    main()

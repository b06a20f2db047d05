"""The optimizer's part of a LoRA step on Mixtral's adapters alone: by torch, and by one kernel (kernels/optimizer/).

    python -m benchmarks.kernels.optimizer [--rounds 15] [--tune]

Both sides take the same gradients, in turns; a round is one step with clipping and the copies in bf16. Milliseconds of
the GPU, medians, each side's parts too; then how far parameters and moments are apart after the rounds, which began
alike. --tune also times other sizes of a program. One JSON object a line. It takes 13 GB of a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS, RANK = 32, 16
SHAPES = (
    (RANK, 4096), (6144, RANK), (RANK, 4096), (4096, RANK),
    (8, RANK, 4096), (8, 28672, RANK), (8, RANK, 14336), (8, 4096, RANK),
)  # fmt: skip
"""A and B of linear_qkv, linear_proj, linear_fc1 and linear_fc2 of a layer."""
TUNED = ((2048, 2048, 8), (4096, 2048, 8), (8192, 2048, 8), (16384, 2048, 8), (4096, 1024, 4), (8192, 1024, 4),
         (1024, 1024, 4), (8192, 4096, 8), (4096, 4096, 8), (32768, 2048, 8))  # fmt: skip
"""Elements of a program, elements at once, warps."""


class Side:
    """Adapters with their optimizer. kind: its class."""

    def __init__(self, kind: Any, gradients: list[Any]) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(1)
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator, device="cuda") * 0.02)
            for _ in range(LAYERS)
            for shape in SHAPES
        ]
        for each, gradient in zip(self.parameters, gradients, strict=True):
            each.grad = gradient
        self.optimizer = kind(self.parameters, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), fused=True)

    def parts(self, ours: bool) -> dict[str, Callable[[], Any]]:
        import torch

        from mixtral_run.model.adapters.cast_adapters import refresh
        from mixtral_run.train.steps.adapter_adamw import apply_gradients

        factor = torch.full((), 0.999, device="cuda")
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        if ours:
            return {"step": lambda: apply_gradients(self.optimizer, factor), "copies": self._refresh(refresh)}
        return {
            "clip": lambda: torch._foreach_mul_(gradients, factor),
            "step": self.optimizer.step,
            "copies": self._refresh(refresh),
        }

    def _refresh(self, refresh: Callable[..., None]) -> Callable[[], None]:
        import torch

        return lambda: refresh(self.parameters, torch.bfloat16)


def seconds_of(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Run calls one after the other. Return each one's milliseconds on the GPU, and of the host for all of them."""
    import time

    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    # Keeps the GPU busy while the host launches: what is measured is the GPU's own time.
    torch.cuda._sleep(40_000_000)
    begin = time.perf_counter()
    events[0].record()
    for event, call in zip(events[1:], calls.values(), strict=True):
        call()
        event.record()
    host = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    times = {name: events[at].elapsed_time(events[at + 1]) for at, name in enumerate(calls)}
    return {**times, "total": events[0].elapsed_time(events[-1]), "host": host}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}


def differences(first: Side, second: Side) -> dict[str, Any]:
    """Return the largest difference relative to the largest number of each tensor, and the share of other bits."""
    result: dict[str, Any] = {}
    for name in ("parameter", "exp_avg", "exp_avg_sq"):
        apart, other, count = 0.0, 0, 0
        for mine, right in zip(first.parameters, second.parameters, strict=True):
            pair = [
                each.detach() if name == "parameter" else side.optimizer.state[each][name]
                for side, each in ((first, mine), (second, right))
            ]
            apart = max(apart, float((pair[0] - pair[1]).abs().max() / pair[1].abs().max()))
            other += int((pair[0] != pair[1]).sum())
            count += pair[0].numel()
        result[name] = {"largest": apart, "other_bits": other / count}
    return result


def tune(side: Side) -> None:
    """Time the kernel with other sizes."""
    import mixtral_run.model.kernels.optimizer.adamw as tables
    import mixtral_run.model.kernels.optimizer.adamw_triton as kernel

    for chunk, block, warps in TUNED:
        vars(tables).update(CHUNK=chunk)
        vars(kernel).update(CHUNK=chunk, BLOCK=block, WARPS=warps)
        side.optimizer._prepared = None
        calls = {"step": side.parts(True)["step"]}
        found = medians([seconds_of(calls) for _ in range(9)][2:])
        print(json.dumps({"chunk": chunk, "block": block, "warps": warps, "step_ms": found["step"]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()

    import torch

    from mixtral_run.train.steps.adapter_adamw import AdapterAdamW

    generator = torch.Generator("cuda").manual_seed(2)
    shapes = [shape for _ in range(LAYERS) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator, device="cuda") * 1e-3 for shape in shapes]]
    gradients.append([each.clone() for each in gradients[0]])
    sides = {"torch": Side(torch.optim.AdamW, gradients[0]), "ours": Side(AdapterAdamW, gradients[1])}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for mine, right in zip(gradients[1], gradients[0], strict=True):
            mine.copy_(right)
        for name, side in sides.items():
            rounds[name].append(seconds_of(side.parts(name == "ours")))
    for name, found in rounds.items():
        print(json.dumps({"side": name, "ms": medians(found[2:])}), flush=True)
    used = sides["ours"].optimizer._prepared is not None
    print(json.dumps({"kernel_ran": used, "apart": differences(sides["ours"], sides["torch"])}), flush=True)
    if arguments.tune:
        tune(sides["ours"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()

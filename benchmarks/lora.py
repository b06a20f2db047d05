"""Speed and memory of LoRA on Mixtral's full width: this kit beside HF transformers + PEFT, on the same GPU.

    python benchmarks/lora.py [--layers 32] [--sizes 512x1,2048x1] [--sides ours,hf,unsloth,axolotl] [--gpus 1]
        [--recompute none|selective|except-attention|full|offload] [--base-precision bf16|fp8|nf4]
        [--kernels auto|portable|hopper] [--rival-checkpointing own|none] [--eager] [--collectives] [--attention-only]
    python benchmarks/lora.py --longest --sides unsloth [--lengths 16384,32768,…]

Every measurement is a process of its own. Weights are random, tokens are random, each step is one micro batch forward
and backward and one AdamW step over adapters on attention and experts (r = 16). The sides besides ours are hf, unsloth
and axolotl, each loaded and patched by its own code (benchmarks/rivals), in bf16, with its own gradient checkpointing
or with none. Medians of the steps after warming up. With more than one GPU our side runs EP over them, tokens a second
are a GPU's. The ratio is ours to the fastest rival. The last line printed is one JSON object, for the last size.

--longest builds one side once, in this process, and takes rows of one length after the other until memory ends; each
is printed as it is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

RANK = 16
ATTENTION = ("linear_qkv", "linear_proj")
MODULES = (*ATTENTION, "linear_fc1", "linear_fc2")
FLAGS = ("eager", "collectives", "attention-only")
LENGTHS = "16384,32768,49152,65536,98304,131072"


def timed_steps(step: Callable[[], object], warm_up: int, count: int, *, in_a_row: bool = False) -> float:
    """Median seconds of a step.

    in_a_row: from the beginning of each step to that of the next, as in a run, where the host prepares a step while the
    GPU is at the last one's optimizer. Each step must end with results on the host. Otherwise a step begins and ends
    with an idle GPU.
    """
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    if in_a_row:
        starts = []
        for _ in range(warm_up + count):
            starts.append(time.perf_counter())
            step()
        synchronize()
        starts.append(time.perf_counter())
        return statistics.median(end - begin for begin, end in itertools.pairwise(starts[warm_up:]))
    seconds = []
    for index in range(warm_up + count):
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        if index >= warm_up:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def build_ours(
    layers: int,
    mesh: Any,
    recompute: str,
    base_precision: str,
    modules: tuple[str, ...] = MODULES,
    kernels: str = "auto",
    attention_precision: str = "bf16",
) -> Any:
    """Mixtral's full width with random weights and adapters on the modules, in training mode."""
    import dataclasses

    import torch

    from mixtral_run.model.adapters.lora_settings import LoraSettings
    from mixtral_run.model.architecture import MIXTRAL_8X7B
    from mixtral_run.model.mixtral import ModelSettings

    architecture = dataclasses.replace(MIXTRAL_8X7B, num_layers=layers)
    lora = LoraSettings(RANK, 32.0, 0.0, modules, 1) if modules else None
    settings = ModelSettings(
        torch.bfloat16, True, lora, recompute, base_precision, kernels, attention_precision=attention_precision
    )
    return random_model(architecture, settings, mesh)


def random_model(architecture: Any, settings: Any, mesh: Any) -> Any:
    """A model of these sizes and settings with random weights, in training mode."""
    import torch

    from mixtral_run.model.mixtral import build_model

    model = build_model(architecture, settings, mesh).train()

    def fill(part: str) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if part in name and "norm" not in name and ".linear_in" not in name and not parameter.is_meta:
                    parameter.normal_(0.0, 0.02)

    fill("")
    model.quantize_attention()
    model.quantize_experts(lambda: fill(".experts."))
    return model


def modules_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    return ATTENTION if arguments.attention_only else MODULES


def run_ours(layers: int, seq: int, micro: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from mixtral_run.config.launch import LaunchConfig
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.data.samples import MockSamples, batches
    from mixtral_run.train.steps.adapter_adamw import AdapterAdamW
    from mixtral_run.train.steps.cuda_graph import backward_of
    from mixtral_run.train.steps.step import EagerBackward, train_step, trainable

    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=world, device="cuda")
    with open_mesh(config) as mesh:
        model = build_ours(
            layers, mesh, arguments.recompute, arguments.base_precision, modules_of(arguments), arguments.kernels
        )
        optimizer = AdapterAdamW(trainable(model), lr=1e-4, fused=True)
        stream = batches(
            MockSamples(model.architecture.vocab_size, seq, 1),
            seed=1,
            micro_batch_size=micro,
            global_batch_size=micro * mesh.data_size,
            data_parallel_rank=mesh.data_rank,
            data_parallel_size=mesh.data_size,
        )

        def run(backward: Any) -> dict[str, Any]:
            def step() -> object:
                return train_step(model, optimizer, next(stream), 1.0, backward)

            seconds = timed_steps(step, 4, arguments.steps, in_a_row=True)
            if arguments.profile is not None:
                # All of them take the step: they exchange.
                write_profile(step, arguments.profile if mesh.is_first else None)
            return {"tok_s": seq * micro / seconds, "peak_gib": torch.cuda.max_memory_reserved() / 1024**3}

        with exchanged_by(collectives=arguments.collectives), backward_of(model, seq * micro) as backward:
            result = run(EagerBackward(model) if arguments.eager else backward)
        return result if mesh.is_first else {}


@contextmanager
def exchanged_by(*, collectives: bool) -> Iterator[None]:
    """While this lasts, `backward_of` takes what exchange it would, or collectives for however many tokens."""
    with ExitStack() as stack:
        if collectives:
            stack.enter_context(
                patch("mixtral_run.train.steps.cuda_graph.open_symmetric_memory", lambda *_, **__: None)
            )
            stack.enter_context(patch("mixtral_run.model.dispatch.capacity.MOST_TOKENS", 2**31))
        yield


def run_rival(side: str, layers: int, seq: int, micro: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure another trainer in its own way (benchmarks/rivals)."""
    import importlib

    from benchmarks.rivals.table import RIVALS

    # Before the harness: a rival changes transformers when it is imported.
    ready = importlib.import_module(RIVALS[side].module).prepare(layers, seq, arguments)

    from benchmarks.rivals.harness import measured

    return measured(ready, seq, micro, arguments)


def write_profile(step: Callable[[], object], path: Path | None) -> None:
    """Kernels of one step by time; recorded but not printed without a path."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as captured:
        step()
        torch.cuda.synchronize()
    table = captured.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    if path is not None:
        path.write_text(table)


def matmul_tflops() -> float:
    """bf16 rate of an 8,192³ product on random numbers: the ceiling that shares are given of."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timed_steps(lambda: left @ right, 5, 20) / 1e12


def measure(side: str, layers: int, seq: int, micro: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.support.child import measured

    words = [
        __file__,
        "--child",
        side,
        "--layers",
        str(layers),
        "--sizes",
        f"{seq}x{micro}",
        "--steps",
        str(arguments.steps),
        "--recompute",
        arguments.recompute,
        "--base-precision",
        arguments.base_precision,
        "--kernels",
        arguments.kernels,
        "--rival-checkpointing",
        arguments.rival_checkpointing,
    ]
    words += [f"--{name}" for name in FLAGS if getattr(arguments, name.replace("-", "_"))]
    if arguments.profile:
        words += ["--profile", str(arguments.profile)]
    found = measured(words, arguments.gpus if side == "ours" else 1)
    return found or {"tok_s": float("nan"), "peak_gib": float("nan")}


def run_child(side: str, layers: int, seq: int, micro: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a side in this process. A side that runs out of memory is a result, too."""
    try:
        if side == "matmul":
            return {"tflops": matmul_tflops()}
        if side == "ours":
            return run_ours(layers, seq, micro, arguments)
        return run_rival(side, layers, seq, micro, arguments)
    except RuntimeError as error:
        # Not imported earlier: a rival sets torch up before the first import.
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        return {"tok_s": float("nan"), "peak_gib": float("nan"), "out_of_memory": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sizes", default="512x1,2048x1,8192x1,2048x4", help="sequence length x micro batch, …")
    parser.add_argument("--sides", type=given_sides, default="ours,hf", help="ours, hf, unsloth, axolotl")
    parser.add_argument(
        "--rival-checkpointing", default="own", choices=("own", "none"), help="gradient checkpointing of the rivals"
    )
    parser.add_argument("--longest", action="store_true", help="one side, rows of growing length until memory ends")
    parser.add_argument("--lengths", default=LENGTHS, help="of --longest")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", type=Path, help="write the kernels of one of our steps there")
    degrees = ("none", "selective", "except-attention", "full", "offload")
    parser.add_argument("--recompute", default="none", choices=degrees, help="of our side")
    parser.add_argument("--base-precision", default="bf16", choices=("bf16", "fp8", "nf4"), help="of our side")
    parser.add_argument("--kernels", default="auto", choices=("auto", "portable", "hopper"), help="of our side")
    parser.add_argument("--eager", action="store_true", help="our side without a CUDA graph; over EP row by row")
    parser.add_argument("--attention-only", action="store_true", help="no adapters on the experts, on both sides")
    parser.add_argument("--collectives", action="store_true", help="our side with all-gather, not GPU from GPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [tuple(int(number) for number in size.split("x")) for size in arguments.sizes.split(",")]
    if arguments.child:
        result = run_child(arguments.child, arguments.layers, *sizes[0], arguments)
        if result:
            print(json.dumps(result), flush=True)
        return

    from benchmarks.rivals.table import require

    require(arguments.sides)
    if arguments.longest:
        from benchmarks.rivals.longest import longest

        if len(arguments.sides) != 1:
            parser.error(f"--longest takes one of --sides; found {','.join(arguments.sides)}")
        longest(arguments.sides[0], [int(length) for length in arguments.lengths.split(",")], arguments)
        return
    report(arguments, sizes)


def given_sides(words: str) -> tuple[str, ...]:
    from benchmarks.rivals.table import sides_of

    try:
        return sides_of(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def report(arguments: argparse.Namespace, sizes: list[tuple[int, ...]]) -> None:
    import dataclasses

    from benchmarks.rivals.table import fastest, versions
    from mixtral_run.model.architecture import MIXTRAL_8X7B

    ceiling = measure("matmul", 1, 1, 1, arguments).get("tflops", float("nan"))
    active = dataclasses.replace(MIXTRAL_8X7B, num_layers=arguments.layers).num_active_parameters
    print(f"{arguments.layers} layers, {arguments.gpus} GPU(s), 8,192³ bf16 product {ceiling:.0f} TFLOP/s")
    named = {side: versions(side) for side in arguments.sides if side != "ours"}
    for side, each in named.items():
        print(f"{side}: {', '.join(' '.join(pair) for pair in each.items())}", end="")
        print(f"; gradient checkpointing: {arguments.rival_checkpointing}")
    print(f"{'size':>8} {'side':>7} {'tok/s/GPU':>10} {'peak GiB':>9} {'TFLOP/s 4P':>10} {'6P':>6} {'of product':>10}")
    summary: dict[str, Any] = {}
    for seq, micro in sizes:
        found = {}
        for side in arguments.sides:
            found[side] = result = measure(side, arguments.layers, seq, micro, arguments)
            print(row_of(f"{seq}x{micro}", side, result, active, ceiling), flush=True)
        summary = {f"{side}_{name}": value for side, result in found.items() for name, value in result.items()}
        summary["versions"] = named
        rival = fastest(found)
        if rival is not None and "ours" in found:
            summary["fastest_rival"] = rival
            summary["ratio"] = found["ours"]["tok_s"] / found[rival]["tok_s"]
            print(f"{'':>8} ratio {summary['ratio']:.2f} to {rival}, the fastest rival", flush=True)
    print(json.dumps(summary))


def row_of(size: str, side: str, result: dict[str, Any], active: int, ceiling: float) -> str:
    """Return a line of the table; for a rival also which code computed the experts."""
    start = f"{size:>8} {side:>7} "
    if result.get("out_of_memory"):
        return start + "out of memory"
    rate = result["tok_s"] * active / 1e12
    row = f"{start}{result['tok_s']:>10,.0f} {result['peak_gib']:>9.1f} {4 * rate:>10.0f} {6 * rate:>6.0f}"
    row += f" {4 * rate / ceiling:>10.0%}"
    if "experts" in result:
        row += f"\n{'':>8} {result['experts']}; {result['trained']:,} trained parameters"
    return row


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()

"""Our side alone, many cases from one built model: recomputation, length and packing, at one precision of the base.

    python -m benchmarks.modes [--layers 32] [--base-precision bf16|fp8|nf4] [--attention-precision bf16|fp8]
        [--cases 2048x1:none,8192x1:selective,…]

A case is SEQxMICRO:RECOMPUTE, with :pack behind it for packed rows of samples between 64 and 512 tokens, :chunks4 for
experts that compute the tokens in 4 chunks, or :layers18 for 18 layers that run again, and selective ones behind them.
Building at full size takes longer than a case, so that this is the way to look at many in little device time;
benchmarks/lora.py measures each in a process of its own. Each case tells the losses of its first and last step: the
adapters are set back and the tokens are the same, so that ways of computing the same can be compared. One JSON object
a case; a case that does not fit says so and the next one runs. Beside each peak stands what the plan counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

CASES = "2048x1:none,2048x1:selective,512x1:none,8192x1:selective,2048x4:selective,2048x1:full,2048x1:none:pack"


PACKED_ROWS = 8
"""That one step after the other takes, again and again."""


def packed_batches(seq: int, vocabulary: int) -> tuple[Any, Any]:
    """Rows of random samples of 64 to 512 tokens, a batch each; and what they hold at most."""
    import torch

    from mixtral_run.model.attention.packed_attention import PackedSizes
    from mixtral_run.train.data.samples import GlobalBatch, MicroBatch

    generator = torch.Generator().manual_seed(3)
    found = []
    most = PackedSizes(0, 0)
    for _ in range(PACKED_ROWS):
        lengths: list[int] = []
        while sum(lengths) < seq:
            lengths.append(min(int(torch.randint(64, 513, (), generator=generator)), seq - sum(lengths)))
        tokens, labels = (torch.randint(0, vocabulary, (1, seq), generator=generator) for _ in range(2))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        micro = MicroBatch(tokens, labels, torch.ones(1, seq), positions, (tuple(lengths),))
        found.append(GlobalBatch((micro,), seq, 1))
        most = PackedSizes(max(most.samples, len(lengths)), max(most.longest, *lengths))
    return itertools.cycle(found), most


def run_case(model: Any, kept: list[Any], case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.lora import timed_steps
    from mixtral_run.planner.memory_model import EXPERT_BYTES, host_bytes, memory
    from mixtral_run.planner.workload import GIB, Layout, Workload
    from mixtral_run.train.data.samples import MockSamples, batches
    from mixtral_run.train.steps.adapter_adamw import AdapterAdamW
    from mixtral_run.train.steps.cuda_graph import backward_of
    from mixtral_run.train.steps.step import train_step, trainable

    size, recompute, *rest = case.split(":")
    if wrong := [each for each in rest if each != "pack" and not re.fullmatch("(chunks|layers)[1-9][0-9]*", each)]:
        expected = f"expected pack, chunksN or layersN behind {size}:{recompute}"
        raise SystemExit(f"--cases: {expected}; found {':'.join(wrong)}")
    seq, micro = (int(number) for number in size.split("x"))
    chunks = next((int(each.removeprefix("chunks")) for each in rest if each.startswith("chunks")), 1)
    again = next((int(each.removeprefix("layers")) for each in rest if each.startswith("layers")), None)
    model.recompute(recompute, again)
    model.settings = dataclasses.replace(model.settings, expert_chunks=chunks)
    parameters = trainable(model)
    with torch.no_grad():
        for parameter, start in zip(parameters, kept, strict=True):
            parameter.copy_(start)
    optimizer = AdapterAdamW(parameters, lr=1e-4, fused=True)
    vocabulary = model.architecture.vocab_size
    whole = micro * arguments.micro_batches
    stream = batches(MockSamples(vocabulary, seq, 1), seed=1, micro_batch_size=micro, global_batch_size=whole)
    most = None
    if "pack" in rest:
        stream, most = packed_batches(seq, vocabulary)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []

    with backward_of(model, seq * micro, captured=not arguments.eager, most=most) as backward:

        def step() -> None:
            losses.append(train_step(model, optimizer, next(stream), 1.0, backward).loss)

        seconds = timed_steps(step, 3, arguments.steps, in_a_row=not arguments.apart)
    workload = Workload(
        architecture=model.architecture,
        kernels=arguments.kernels,
        gpus=1,
        seq_length=seq,
        micro_batch_size=micro,
        expert_bytes=EXPERT_BYTES.get(arguments.base_precision, 2),
        attention_precision=arguments.attention_precision,
    )
    layout = Layout(1, 1, recompute, 1, chunks, again)
    return {
        "tok_s": round(seq * (1 if "pack" in rest else whole) / seconds),
        "peak_gib": round(torch.cuda.max_memory_reserved() / GIB, 1),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "planned_gib": round(memory(workload, layout).allocated / GIB, 1),
        "planned_host_gib": round(host_bytes(workload, layout) / GIB, 1),
        "losses": [round(each, 5) for each in (losses[0], losses[-1])],
    }


def options() -> argparse.ArgumentParser:
    """Return the command line, by which tests/gpu too makes the arguments of `run_case`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--base-precision", default="bf16", choices=("bf16", "fp8", "nf4"))
    parser.add_argument("--attention-precision", default="bf16", choices=("bf16", "fp8"))
    parser.add_argument("--kernels", default="auto", choices=("auto", "portable", "hopper"))
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step; not of a packed one")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--apart", action="store_true", help="each step begins and ends with an idle GPU")
    return parser


def main() -> None:
    arguments = options().parse_args()

    import torch

    from benchmarks.lora import build_ours
    from mixtral_run.config.launch import LaunchConfig
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.steps.step import trainable

    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    with open_mesh(config) as mesh:
        model = build_ours(
            arguments.layers,
            mesh,
            "none",
            arguments.base_precision,
            kernels=arguments.kernels,
            attention_precision=arguments.attention_precision,
        )
        named = {"base": arguments.base_precision, "attention": arguments.attention_precision}
        # On the host: the peaks are those of a run.
        kept = [parameter.detach().cpu() for parameter in trainable(model)]
        for case in arguments.cases.split(","):
            try:
                result = run_case(model, kept, case, arguments)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                result = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            for parameter in trainable(model):
                parameter.grad = None
            gc.collect()
            torch.cuda.empty_cache()
            print(json.dumps({"case": case, **named, "kernels": arguments.kernels, **result}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()

"""Time a token of generation on Mixtral's full width: recorded passes, launched ones and HF transformers.

    python -m benchmarks.generation [--layers 32] [--rows 1,8] [--sides captured,launched,peer] [--gpus 1]
        [--adapted] [--base-precision bf16|fp8|nf4] [--profile FILE]

Every measurement is a process of its own, or one a GPU with EP over them. Weights are random, prompts are of 512 random
tokens, the likeliest token is taken. What counts is the median time from a token to the next; beside it the first one,
with the pass over the prompts and all that is compiled, and recording. The peer: HF transformers' `generate` with its
growing cache, grouped_mm and fused attention, on one GPU. It decodes with batched_mm, which copies the weights of each
row's experts in every layer (23 GB for 32 rows), so that many rows take it fewer tokens: the median needs a dozen. The
last line printed is one JSON object, for the last number of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = 512
SIDES = ("captured", "launched", "peer")
PEER_TOTAL, PEER_TOKENS = 256, 16
"""The peer generates this many tokens over all rows, and not fewer than so many for each."""


class Gaps:
    """Takes the time of each token as it comes."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def found(self, rows: int, skipped: int) -> dict[str, Any]:
        """skipped: gaps at the beginning that are no usual ones."""
        gaps = [1e3 * (after - before) for before, after in zip(self.times, self.times[1:], strict=False)]
        usual = statistics.median(gaps[skipped:])
        return {"ms": usual, "tok_s": rows * 1e3 / usual, "start_ms": sum(gaps[:skipped]) - skipped * usual}


def run_ours(rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.lora import MODULES, build_ours, write_profile
    from mixtral_run.config.launch import LaunchConfig
    from mixtral_run.inference.continuation import Sampling, continue_rows
    from mixtral_run.inference.decode import Decoding
    from mixtral_run.model.parallel.mesh import open_mesh

    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=world, device="cuda")
    with open_mesh(config) as mesh:
        modules = MODULES if arguments.adapted else ()
        model = build_ours(arguments.layers, mesh, "none", arguments.base_precision, modules)
        model.eval().requires_grad_(False)
        prompts = random_prompts(rows)
        kind = Decoding if arguments.child == "launched" else None

        def generated(count: int, on_pass: Callable[..., None] | None = None) -> None:
            # No token is the end.
            continue_rows(model, prompts, (), Sampling(count, 0.0, 1.0, 1), on_pass, kind)

        gaps = Gaps()
        generated(arguments.tokens, lambda *_: gaps.put(None))
        if arguments.profile is not None:
            # All of them take the steps: they exchange.
            path = arguments.profile.with_stem(f"{arguments.profile.stem}-{rows}") if mesh.is_first else None
            write_profile(lambda: generated(32), path)
        return gaps.found(rows, 2) if mesh.is_first else {}


def run_peer(rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(num_hidden_layers=arguments.layers, max_position_embeddings=32768, rope_theta=1e6)
    config._experts_implementation = "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MixtralForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    gaps = Gaps()
    tokens = torch.tensor(random_prompts(rows), device="cuda")
    # A streamer takes one row alone, and is given the prompt first.
    clock = Clock(gaps)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=arguments.tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[clock],
    )
    return gaps.found(rows, 2)


class Clock:
    """Called with each token's logits."""

    def __init__(self, gaps: Gaps) -> None:
        self.gaps = gaps

    def __call__(self, tokens: Any, logits: Any) -> Any:
        import torch

        torch.cuda.synchronize()
        self.gaps.put(tokens)
        return logits


def random_prompts(rows: int) -> list[list[int]]:
    import torch

    draw = torch.Generator().manual_seed(1)
    return torch.randint(1, 32000, (rows, PROMPT), generator=draw).tolist()


def tokens_of(side: str, rows: int, tokens: int) -> int:
    """Return how many tokens a side generates for each of the rows."""
    return min(tokens, max(PEER_TOKENS, PEER_TOTAL // rows)) if side == "peer" else tokens


def measure(side: str, rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.support.child import measured

    words = ["-m", "benchmarks.generation", "--child", side, "--rows", str(rows), "--layers", str(arguments.layers)]
    words += ["--tokens", str(tokens_of(side, rows, arguments.tokens)), "--base-precision", arguments.base_precision]
    words += ["--adapted"] if arguments.adapted else []
    words += ["--profile", str(arguments.profile)] if arguments.profile and side == "captured" else []
    found = measured(words, 1 if side == "peer" else arguments.gpus)
    return found or dict.fromkeys(("ms", "tok_s", "start_ms"), float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", default="1,8", help="prompts at once")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--adapted", action="store_true", help="our sides with adapters on everything")
    parser.add_argument("--base-precision", default="bf16", choices=("bf16", "fp8", "nf4"), help="of our sides")
    parser.add_argument(
        "--profile", type=Path, help="write the kernels of 32 tokens of a captured pass there, -ROWS in the name"
    )
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        result = (run_peer if arguments.child == "peer" else run_ours)(int(arguments.rows), arguments)
        if result:
            print(json.dumps(result), flush=True)
        return
    print(f"{arguments.layers} layers, {arguments.gpus} GPU(s), base {arguments.base_precision}")
    print(f"{'rows':>4} {'side':>9} {'ms a token':>10} {'tokens/s':>9} {'start ms':>9}")
    found: dict[str, dict[str, Any]] = {}
    for rows in (int(word) for word in arguments.rows.split(",")):
        found = {}
        for side in arguments.sides.split(","):
            found[side] = result = measure(side, rows, arguments)
            print(
                f"{rows:>4} {side:>9} {result['ms']:>10.2f} {result['tok_s']:>9,.1f} {result['start_ms']:>9,.0f}",
                flush=True,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()

"""Delay of training by saves of an adapter: no save, a blocking one, one in the background, in the same run.

    python -m benchmarks.saving                                    # two cores: 100 MB of adapters and moments
    python -m benchmarks.saving --processes 2 --folder /on/the/disk
    python -m benchmarks.saving --device cuda                      # one GPU: Mixtral's full width, 4 layers, 321 MB
    python -m benchmarks.saving --device cuda --processes 8 --layers 32

Random weights and tokens. Rounds of each way alternate, with a save at the first of every --every steps. Times end with
the results of a step on the host, and include all that the loop does between two steps. The last line is one JSON
object; times are medians in seconds, and shares are of a step without saves:

    step          a step without saves
    delay         what the training waits in the calls that save, and ask whether a save is complete
    slower        what the --every steps from one save to the next take more, without these calls
    cpu           what the first process computes more from one save to the next, which other jobs do not disturb
    write         until the checkpoint has its name
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("none", "blocking", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write [default: this folder]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=0, help="of the adapters [default: 64 on CPUs, 16 on GPUs]")
    parser.add_argument("--tokens", type=int, default=0, help="of a step and process [default: 1024, on GPUs 4096]")
    parser.add_argument("--every", type=int, default=0, help="steps between saves [default: 5, on GPUs 40]")
    parser.add_argument("--rounds", type=int, default=6, help="saves of each way")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on CPUs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Steps of a GPU are short beside the time that a disk takes for a checkpoint.
    options.every = options.every or (40 if options.device == "cuda" else 5)
    if options.child:
        warnings.simplefilter("ignore")
        measure(options)
        return
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    argv += ["-m", "benchmarks.saving", "--child", *sys.argv[1:]]
    subprocess.run(argv, check=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})


def build(options: argparse.Namespace, mesh: Any) -> Any:
    """A model with adapters on all layers."""
    import torch

    from benchmarks.base_loss import SMALL
    from benchmarks.lora import MODULES
    from mixtral_run.model.adapters.lora_settings import LoraSettings
    from mixtral_run.model.architecture import MIXTRAL_8X7B
    from mixtral_run.model.mixtral import ModelSettings, build_model

    on_gpu = mesh.device.type == "cuda"
    small = dataclasses.replace(SMALL, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=8, num_query_groups=4)
    shape = dataclasses.replace(MIXTRAL_8X7B if on_gpu else small, num_layers=options.layers)
    lora = LoraSettings(options.rank or (16 if on_gpu else 64), 32.0, 0.0, MODULES, 1)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = build_model(shape, ModelSettings(dtype, True, lora, "none"), mesh).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and ".linear_in" not in name:
                parameter.normal_(0.0, 0.02)
    return model


def measure(options: argparse.Namespace) -> None:
    import torch

    from mixtral_run.config.launch import LaunchConfig
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.checkpoints.saving import AdapterSaver
    from mixtral_run.train.data.samples import MockSamples, batches
    from mixtral_run.train.steps.cuda_graph import backward_of
    from mixtral_run.train.steps.step import train_step, trainable

    tokens = options.tokens or (4096 if options.device == "cuda" else 1024)
    size = int(os.environ["WORLD_SIZE"])
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=size, device=options.device)
    with open_mesh(config) as mesh, tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as own:
        model = build(options, mesh)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-5, fused=True)
        stream = batches(
            MockSamples(model.architecture.vocab_size, tokens, 1), seed=1, micro_batch_size=1,
            global_batch_size=mesh.data_size, data_parallel_rank=mesh.data_rank, data_parallel_size=mesh.data_size,
        )  # fmt: skip
        folder: list[Any] = [own]
        torch.distributed.broadcast_object_list(folder)
        with backward_of(model, tokens, captured=True, peer_access=mesh.device.type == "cuda") as backward:

            def step() -> None:
                train_step(model, optimizer, next(stream), 1.0, backward)

            for _ in range(3):
                step()
            savers = {way: AdapterSaver(model, optimizer, Path(folder[0]) / way) for way in WAYS}
            num_bytes = savers["background"].prepare_background()
            found = run_rounds(options, step, savers)
        if mesh.is_first:
            report(found, num_bytes, options.every)


def run_rounds(options: argparse.Namespace, step: Callable[[], None], savers: dict[str, Any]) -> dict[str, Any]:
    """Seconds by way and by the step's place after a save, for all rounds; seconds of writing, for each save."""
    import torch.distributed as dist

    from mixtral_run.train.checkpoints.saving import SaveRequest

    seconds: dict[str, list[list[float]]] = {way: [[] for _ in range(options.every)] for way in WAYS}
    writes: dict[str, list[float]] = {way: [] for way in WAYS}
    computed: dict[str, list[float]] = {way: [] for way in WAYS}
    waits: dict[str, list[float]] = {way: [] for way in WAYS}
    description = {
        "dtype": "float32", "base": {"fingerprint": "0-0", "path": None}, "training": {}, "data_sha256": None,
        "lora": {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target_modules": ["linear_qkv"]},
    }  # fmt: skip
    # The first round of each way warms up. Checkpoints stay until the end: removing them would be part of a step.
    for number in range(options.rounds + 1):
        for way in WAYS:
            saver = savers[way]
            computing = time.process_time()
            waited = 0.0
            for place in range(options.every):
                dist.barrier()
                began = time.perf_counter()
                step()
                stepped = time.perf_counter()
                written = saver.poll()
                if place == 0 and way == "blocking":
                    saver.save(SaveRequest(number, description))
                    written = time.perf_counter() - stepped
                elif place == 0 and way == "background":
                    saver.save_in_background(SaveRequest(number, description))
                waited += time.perf_counter() - stepped
                if number:
                    seconds[way][place].append(stepped - began)
                    writes[way] += [written] if written is not None else []
            if number:
                waits[way].append(waited)
            began = time.perf_counter()
            late = saver.finish()
            if late is not None and number:
                writes[way].append(late)
                print(f"a save was {time.perf_counter() - began:.2f} s late: --every is too small", file=sys.stderr)
            if number:
                computed[way].append(time.process_time() - computing)
    return {"seconds": seconds, "writes": writes, "computed": computed, "waits": waits}


def report(found: dict[str, Any], num_bytes: int, every: int) -> None:
    seconds = found["seconds"]
    step = statistics.median(each for place in seconds["none"] for each in place)
    result: dict[str, Any] = {"mb": round(num_bytes / 1e6), "step": round(step, 4)}
    for way in WAYS[1:]:
        delay = statistics.median(found["waits"][way])
        slower = sum(statistics.median(place) for place in seconds[way]) - every * step
        cpu = statistics.median(found["computed"][way]) - statistics.median(found["computed"]["none"])
        write = statistics.median(found["writes"][way])
        times = {"delay": delay, "slower": slower, "cpu": cpu, "write": write}
        result[way] = {name: round(each, 4) for name, each in times.items()}
        result[way] |= {"delay_share": round(delay / step, 4), "slower_share": round(slower / step, 4)}
        print(
            f"{way}: a save delays a step by {delay / step:.1%}, and slows the next ones by {slower / step:.1%} of one"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Time and bytes read of a start with a base in 8 or 4 bit: without the cache, creating it, and reading it.

    python -m benchmarks.quantized_start                    # 1.6 GB in bf16, on the CPU
    python -m benchmarks.quantized_start --layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --device cuda \\
        --folder /on/the/disk                           # Mixtral 8x7B on one GPU: 187 GB of disk, and 45 or 24

Each measurement is a process of its own and begins with the base and what is kept beside it out of the page cache. The
clock runs from the built model to the loaded one; what is kept is on the disk by then. Bytes are what the process read
and wrote meanwhile, by the kernel's count of its calls. Rounds are interleaved; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.make_mixtral import add_size_options, make, scaled
from benchmarks.support import process_memory
from mixtral_run.weights.io.disk import drop_from_cache

WAYS = {"quantised": "no", "kept": "yes", "taken": "use"}
"""In the order of a round, and --quantized-cache of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    add_size_options(parser, layers=8, hidden_size=1024, ffn_hidden_size=3584)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["fp8", "nf4"], choices=("fp8", "nf4"))
    parser.add_argument("--bases", nargs="+", default=["checkpoint", "hf"], choices=("checkpoint", "hf"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--run", nargs=3, metavar=("BASE", "PRECISION", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        base, precision, way = options.run
        print(json.dumps(measure(Path(base), precision, WAYS[way], options.device)))
    else:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
            print(json.dumps(compare(Path(folder), options)))


def compare(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds; of memory the most."""
    bases = make_bases(work, options)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for name, base in bases.items():
            for precision in options.precisions:
                shutil.rmtree(base / f"quantised-{precision}", ignore_errors=True)
                for way in WAYS:
                    one = measured(base, precision, way)
                    found.setdefault(f"{name} {precision} {way}", []).append(one)
                    reported = ", ".join(f"{what} {value:,.2f}" for what, value in one.items())
                    print(f"round {number + 1}: {name} {precision} {way:<9} {reported}", flush=True)
    return {
        name: {
            what: round((max if "peak" in what else statistics.median)(each[what] for each in rounds), 3)
            for what in rounds[0]
        }
        for name, rounds in found.items()
    }


def make_bases(work: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The HF model, and its checkpoint where one is asked for."""
    from mixtral_run.config.verbs.weights import ConvertConfig
    from mixtral_run.terminal.report import Report
    from mixtral_run.weights.convert.to_megatron import convert

    architecture = scaled(options.layers, options.hidden_size, options.ffn_hidden_size, options.vocab_size)
    shards = max(2, -(-architecture.num_parameters * 2 // (5 * 10**9)))
    make(work / "hf", architecture, num_shards=shards, seed=options.seed, workers=8)
    if "checkpoint" in options.bases:
        convert(ConvertConfig(hf_model_path=str(work / "hf"), output_path=work / "checkpoint"), Report.silent())
    return {name: work / name for name in options.bases}


def measured(base: Path, precision: str, way: str) -> dict[str, float]:
    for file in base.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                drop_from_cache(stream.fileno())
    command = [sys.executable, "-m", "benchmarks.quantized_start", *sys.argv[1:], "--run", str(base), precision, way]
    one, memory = process_memory.measured(command)
    return {**one, "peak_anonymous_mb": round(memory.peak_anonymous_bytes / 1e6)}


def measure(base: Path, precision: str, mode: str, device: str) -> dict[str, float]:
    """Run one measurement in this process; print seconds, CPU seconds, GB read and written."""
    import torch

    from mixtral_run.config.lora import LORA_TARGET_MODULES
    from mixtral_run.config.verbs.weights import VerifyConfig
    from mixtral_run.model.adapters.lora_settings import LoraSettings
    from mixtral_run.model.mixtral import ModelSettings, build_model
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.checkpoints.checkpoint import load_base
    from mixtral_run.train.quantized_experts import CacheOptions
    from mixtral_run.weights.manifest.describe import describe_base

    description = describe_base(base)
    lora = LoraSettings(16, 32.0, 0.0, LORA_TARGET_MODULES, 1)
    with open_mesh(VerifyConfig(load=base, device=device)) as mesh:
        model = build_model(
            description.architecture, ModelSettings(torch.bfloat16, True, lora, "none", precision), mesh
        )
        before, started, cpu = counts(), time.perf_counter(), time.process_time()
        load_base(model, description, CacheOptions(mode))
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds, after = time.perf_counter() - started, time.process_time() - cpu, counts()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gb_read": (after["rchar"] - before["rchar"]) / 1e9,
        "gb_written": (after["wchar"] - before["wchar"]) / 1e9,
    }


def counts() -> dict[str, int]:
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in lines}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

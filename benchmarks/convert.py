"""Speed of `mixtral-run convert` next to a copy of the same bytes and next to the usual way; and a start without it.

    python -m benchmarks.convert                       # 1.6 GB, disk to disk and RAM to RAM
    python -m benchmarks.convert --layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --rounds 3 \\
        --ways copy stream read direct load --processes 4 --folder /on/the/disk
                                                        # Mixtral 8x7B: 187 GB of disk, 187 GB of /dev/shm

Each measurement is a process of its own. On the disk it starts with the source out of the page cache and ends with the
result on the disk (fsync). The clock runs from the call to the last fsync; imports are over by then, in all of them.
Rounds are interleaved, so that a disk that slows down slows all of them. Memory is that of all processes together,
sampled from outside: anonymous, and resident. The last line printed is one JSON object.

`--at-least stream/copy=0.8` (may be repeated) makes it a guard against regressions: exit code 1 if, in any place, the
median speed of the first way is below that share of the second one's in the same run.

    stream   mixtral_run.weights.convert.to_megatron
    copy     cp --recursive, then fsync of every file
    usual    transformers' from_pretrained, the state dict under Megatron's keys, torch.distributed.checkpoint.save
    read     every byte of the source read once, into buffers that are thrown away
    direct   the source loaded into a model's parameters by several processes, then one iteration of LoRA
    load     the same from the checkpoint that `stream` makes of it, before the first round
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.make_mixtral import add_size_options, make, scaled
from benchmarks.support import process_memory

WAYS = ("copy", "stream", "usual", "read", "direct", "load")
PLACES = ("disk", "ram")
BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Floor:
    """Lowest speed of one way, as a share of another way's in the same run."""

    way: str
    rival: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Read `WAY/WAY=SHARE`. Raise argparse.ArgumentTypeError for anything else."""
        found = re.fullmatch(r"(\w+)/(\w+)=(\d+(?:\.\d+)?)", text)
        if not found or not {found[1], found[2]} <= set(WAYS):
            raise argparse.ArgumentTypeError(f"expected WAY/WAY=SHARE with ways of {', '.join(WAYS)}; found {text}")
        return cls(found[1], found[2], float(found[3]))

    def __str__(self) -> str:
        return f"{self.way}/{self.rival}={self.share:g}"

    def missed(self, places: dict[str, dict[str, dict[str, float]]]) -> list[str]:
        """Return a line for each place in which the way is slower than that."""
        reached = {place: ways[self.way]["gb_s"] / ways[self.rival]["gb_s"] for place, ways in places.items()}
        return [
            f"{place}: {self.way} has {share:.2f} of the speed of {self.rival}; expected at least {self.share:g}"
            for place, share in reached.items()
            if share < self.share
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work on the disk to measure (default: a temporary one)")
    parser.add_argument("--ram-folder", type=Path, default=Path("/dev/shm"), help="a folder in memory")
    parser.add_argument("--model", type=Path, help="take this one, of an earlier make_mixtral, in place of making it")
    add_size_options(parser, layers=8, hidden_size=1024, ffn_hidden_size=3584)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--places", nargs="+", default=PLACES, choices=PLACES)
    parser.add_argument("--workers", type=int, help="of stream (default: it measures)")
    parser.add_argument("--processes", type=int, default=2, help="of direct and load, as TP2 where even, EP of all")
    parser.add_argument("--at-least", type=Floor.parse, action="append", default=[], metavar="WAY/WAY=SHARE")
    parser.add_argument("--run", choices=(*WAYS, "model"), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run == "model":
        architecture = scaled(options.layers, options.hidden_size, options.ffn_hidden_size, options.vocab_size)
        shards = max(2, -(-architecture.num_parameters * 2 // (5 * 10**9)))
        make(options.target, architecture, num_shards=shards, seed=options.seed, workers=8)
    elif options.run:
        print(json.dumps(measure(options)))
    else:
        for floor in options.at_least:
            if not {floor.way, floor.rival} <= set(options.ways):
                parser.error(f"--at-least {floor}: needs --ways {floor.way} {floor.rival}")
        result = compare(options)
        print(json.dumps(result))
        slow = [
            line for floor in options.at_least for line in floor.missed({each: result[each] for each in options.places})
        ]
        if slow:
            raise SystemExit("\n".join(slow))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, by place and way."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        works = {}
        for place in options.places:
            parent = options.folder if place == "disk" else options.ram_folder
            work = works[place] = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=parent)))
            # In a process of its own: what is drawn for the model is no memory of what is measured.
            if options.model is not None:
                (work / "hf").symlink_to(options.model.absolute())
            else:
                run_again("--run", "model", "--target", str(work / "hf"))
            if "load" in options.ways:
                run_again("--run", "stream", "--source", str(work / "hf"), "--target", str(work / "checkpoint"))
        for number in range(options.rounds):
            for place, work in works.items():
                for way in options.ways:
                    of_way = (work / ("checkpoint" if way == "load" else "hf")).resolve()
                    one = measured(place, way, of_way, work / "out")
                    found.setdefault((place, way), []).append(one)
                    reported = ", ".join(f"{name} {value:,.2f}" for name, value in one.items())
                    print(f"round {number + 1}: {place} {way:<6} {reported}", flush=True)
    result: dict[str, Any] = {place: {} for place in options.places}
    for (place, way), rounds in found.items():
        medians = {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}
        for name in ("peak_anonymous_mb", "peak_rss_mb"):
            medians[name] = max(one[name] for one in rounds)
        result[place][way] = medians
    return headline(result) | result


def headline(result: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return the first result of the place that was measured first."""
    ways = next(iter(result.values()))
    reported = {f"{way}_mb_s": round(ways[way]["gb_s"] * 1e3, 1) for way in ("stream", "copy", "usual") if way in ways}
    return reported | {f"{way}_peak_rss_mb": ways[way]["peak_rss_mb"] for way in ("stream", "usual") if way in ways}


def measured(place: str, way: str, source: Path, target: Path) -> dict[str, float]:
    """One measurement in a process of its own: GB/s, seconds, and the most memory of it and all it started."""
    if place == "disk":
        drop_from_cache(source)
    command = again("--run", way, "--source", str(source), "--target", str(target))
    one, memory = process_memory.measured(command)
    num_bytes = sum(file.stat().st_size for file in source.rglob("*") if file.suffix in (".safetensors", ".distcp"))
    one = {"gb_s": num_bytes / 1e9 / one["seconds"], **one}
    one["peak_anonymous_mb"] = round(memory.peak_anonymous_bytes / 1e6)
    one["peak_rss_mb"] = round(memory.peak_resident_bytes / 1e6)
    if target.exists():
        shutil.rmtree(target)
        os.sync()
    return one


def again(*words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.convert", *sys.argv[1:], *words]


def run_again(*words: str) -> None:
    subprocess.run(again(*words), check=True)


def drop_from_cache(folder: Path) -> None:
    for file in (each for each in folder.rglob("*") if each.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one measurement in this process."""
    if options.run in ("direct", "load"):
        return direct(options.source, options.processes)
    if options.run == "stream":
        return stream(options.source, options.target, options.workers)
    way = {"copy": copy, "usual": usual, "read": read}[options.run]
    return {"seconds": way(options.source, options.target)}


def stream(source: Path, target: Path, workers: int | None) -> dict[str, float]:
    import torch.distributed.checkpoint  # noqa: F401 - imported before the clock starts

    from mixtral_run.config.verbs.weights import ConvertConfig
    from mixtral_run.terminal.report import Report
    from mixtral_run.weights.convert.to_megatron import convert

    started = time.perf_counter()
    config = ConvertConfig(hf_model_path=str(source), output_path=target, workers=workers)
    result = convert(config, Report.silent())
    return {"seconds": time.perf_counter() - started, "workers": result.num_workers}


def read(source: Path, _: Path) -> float:
    """With as many threads as a good conversion has; what a start without one cannot be faster than."""
    started = time.perf_counter()
    tasks = []
    for file in sorted(source.glob("*.safetensors")):
        size = file.stat().st_size
        tasks += [(file, start, min(start + 32 * BLOCK_BYTES, size)) for start in range(0, size, 32 * BLOCK_BYTES)]

    def run(task: tuple[Path, int, int]) -> None:
        file, start, stop = task
        buffer = memoryview(bytearray(BLOCK_BYTES))
        descriptor = os.open(file, os.O_RDONLY)
        while start < stop:
            start += os.preadv(descriptor, [buffer[: min(BLOCK_BYTES, stop - start)]], start)
        os.close(descriptor)

    with ThreadPoolExecutor(max(4, min(32, os.cpu_count() or 1))) as pool:
        list(pool.map(run, tasks))
    return time.perf_counter() - started


def direct(source: Path, processes: int) -> dict[str, float]:
    """`seconds` is the loading alone."""
    tensor_size = 2 if processes % 2 == 0 else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.support.direct_load", str(source)]
    command += ["--tensor-model-parallel-size", str(tensor_size), "--expert-model-parallel-size", str(processes)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"direct ended with {done.returncode}:\n{done.stderr[-8000:]}")
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    return {"seconds": found.pop("load_seconds"), **found, "command_seconds": whole}


def copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "--recursive", str(source), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def usual(source: Path, target: Path) -> float:
    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM, MixtralForCausalLM  # noqa: F401 - the class is imported lazily

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config, hf = model.config, model.state_dict()
    groups, hidden = config.num_key_value_heads, config.hidden_size
    heads = config.num_attention_heads // groups
    state = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (hf[f"{old}self_attn.{name}_proj.weight"] for name in "qkv")
        parts = [q.view(groups, heads, -1, hidden), k.view(groups, 1, -1, hidden), v.view(groups, 1, -1, hidden)]
        state[new + "self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).reshape(-1, hidden)
        state[new + "self_attention.linear_proj.weight"] = hf[old + "self_attn.o_proj.weight"]
        state[new + "input_layernorm.weight"] = hf[old + "input_layernorm.weight"]
        state[new + "pre_mlp_layernorm.weight"] = hf[old + "post_attention_layernorm.weight"]
        state[new + "mlp.router.weight"] = hf[old + "mlp.gate.weight"]
        for expert in range(config.num_local_experts):
            name = f"{new}mlp.experts.local_experts.{expert}."
            state[name + "linear_fc1.weight"] = hf[old + "mlp.experts.gate_up_proj"][expert]
            state[name + "linear_fc2.weight"] = hf[old + "mlp.experts.down_proj"][expert]
    dcp.save(state, checkpoint_id=target, no_dist=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

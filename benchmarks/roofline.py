"""Measure the parts of a training step beside their floors: one table for each size and precision.

    python -m benchmarks.roofline [--layers 32] [--sizes 2048x1,512x1] [--base-precision bf16|fp8|nf4]
        [--attention-precision bf16|fp8] [--kernels auto|portable|hopper]

The GPU's kernels of one captured step are timed by the profiler and summed by what they are part of. The floor of a
part is the larger of its operations over the rate of a large matrix product and of its bytes over the rate of a large
copy, both measured in the same run. Bytes count each input that must be read and each result that must be written once;
weights in 8 bit are multiplied at twice the rate. What remains between the kernels and the step's own time is the host,
the optimizer's launches and gaps. Random weights and tokens, adapters of rank 16 on attention and experts. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = {
    "experts' products": r"^(un)?transposed$|_grouped_product_kernel|_tiled_product_kernel|_scaled_gr"
    r"|GroupProblemShape|grouped|_expand_\d_bits|_transpose_kernel",
    "adapters of the experts": r"_narrow_",
    "SwiGLU": r"_swiglu_|_over_blocks_",
    "quantization of rows": r"_quantize_",
    "loss": r"_cross_entropy_",
    "attention": r"flash|fmha|sdpa|attention",
    "dense products": r"gemm|nvjet|cutlass|xmma|splitK|gemv|dot_kernel|reduce_1Block",
    "permutation": r"_add_rows_kernel|_spread_kernel|_count_kernel|_place_kernel|_sort_few_kernel"
    r"|index_?[sS]elect|gather|index_elem",
    "router": r"_choose_|_route_backward_kernel|topk|sort|bitonic|radix|_mix_rows_kernel|softmax|_row_products|scatter",
    "norms": r"norm|rsqrt",
    "rotary": r"_rotate_kernel",
    "optimizer and clipping": r"multi_tensor|adam|foreach|lpnorm",
    "copies and fills": r"mem(cpy|set)|[cC]opy|fill|cat|Cat",
    "elementwise": r"elementwise|reduce_kernel|where",
}
"""Kernels by their names: the first expression that is found in a name decides."""


@dataclass(frozen=True)
class Step:
    """The sizes of a step.

    precision, attention: of the weights of the experts and of the dense products. itemsize: bytes of one of the former.
    """

    layers: int
    tokens: int
    precision: str
    hidden: int = 4096
    ffn: int = 14336
    experts: int = 8
    topk: int = 2
    heads: int = 32
    groups: int = 8
    head_size: int = 128
    vocabulary: int = 32000
    rank: int = 16
    attention: str = "bf16"

    @property
    def itemsize(self) -> float:
        return {"bf16": 2.0, "fp8": 1.0, "nf4": 0.53125}[self.precision]

    def floors(self, product: float, copy: float) -> dict[str, float]:
        """Return the floor of each part in milliseconds. product: FLOP a second; copy: bytes a second."""
        t, h, f, layers = self.tokens, self.hidden, self.ffn, self.layers
        rows, qkv = t * self.topk, (self.heads + 2 * self.groups) * self.head_size

        def at_least(operations: float, moved: float, rate: float = product) -> float:
            return 1e3 * max(operations / rate, moved / copy)

        weights = self.experts * 3 * h * f * self.itemsize
        experts = at_least(
            2 * 2 * rows * 3 * h * f,
            2 * (weights + 2 * rows * (2 * h + 3 * f)),
            product * (2 if self.precision == "fp8" else 1),
        )
        adapters = at_least(0, 2 * (rows * h * 4 + rows * f * 4) + 3 * 4 * self.experts * self.rank * (2 * h + 3 * f))
        # In 8 bit each direction has a copy of its own.
        small = self.attention == "fp8"
        each, dense_rate = (1, 2 * product) if small else (2, product)
        dense = at_least(2 * 2 * t * h * (qkv + h), 2 * each * h * (qkv + h) + 4 * t * (2 * h + qkv), dense_rate)
        head = at_least(4 * t * h * self.vocabulary, 2 * each * h * self.vocabulary, dense_rate)
        # Read in bf16 and written in 8 bit.
        quantized = layers * at_least(0, 3 * (t * h + rows * (h + 3 * f))) * (self.precision == "fp8")
        quantized += small * at_least(0, 3 * t * (layers * (3 * h + qkv) + h + self.vocabulary))
        return {
            "experts' products": layers * experts,
            "adapters of the experts": layers * adapters,
            "SwiGLU": layers * at_least(0, 2 * rows * f * 9),
            "quantization of rows": quantized,
            "attention": layers * at_least(3.5 * 2 * t * t * self.heads * self.head_size, 2 * t * (qkv + h) * 4),
            "dense products": layers * dense + head,
            "loss": at_least(0, 2 * 3 * t * self.vocabulary),
            "permutation": layers * at_least(0, 2 * (4 * rows * h + 4 * t * h)),
            "router": layers * at_least(0, 2 * 2 * t * h),
            "norms": layers * at_least(0, 2 * 2 * 5 * t * h),
            "rotary": layers * at_least(0, 2 * 4 * t * qkv),
            "optimizer and clipping": at_least(0, 4 * 9 * self.adapter_parameters),
            "elementwise": layers * at_least(0, 2 * 2 * 3 * t * h),
        }

    @property
    def adapter_parameters(self) -> int:
        qkv = (self.heads + 2 * self.groups) * self.head_size
        dense = self.hidden + qkv + self.heads * self.head_size + self.hidden
        return self.layers * self.rank * (dense + self.experts * (2 * self.hidden + 3 * self.ffn))


def part_of(kernel: str) -> str:
    return next((part for part, expression in PARTS.items() if re.search(expression, kernel)), "other")


def recorded(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The events of one call on the GPU, with their microseconds as `dur`, and the operations of the CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True) as found:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    return events


def on_gpu(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in events if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def dense_by_shape(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of the dense products of an eager step, by operation and shapes."""
    operations = {
        each["args"]["External id"]: each
        for each in events
        if each.get("cat") == "cpu_op" and "External id" in each.get("args", {})
    }
    found: dict[str, float] = {}
    for each in on_gpu(events):
        operation = operations.get(each.get("args", {}).get("External id"))
        if operation is not None and part_of(each["name"]) == "dense products":
            shapes = [shape for shape in operation["args"].get("Input Dims", []) if shape]
            key = f"{operation['name'].removeprefix('aten::')} {' '.join('x'.join(map(str, s)) for s in shapes)}"
            found[key] = found.get(key, 0.0) + each["dur"] / 1e3
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def ceilings() -> tuple[float, float]:
    """FLOP a second of a large bf16 product, and bytes a second, read and written, of a large copy."""
    import torch

    from benchmarks.lora import matmul_tflops, timed_steps

    source, target = (torch.empty(2**32, dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = timed_steps(lambda: target.copy_(source), 2, 10)
    return matmul_tflops() * 1e12, 2 * 2**32 / seconds


def measure(
    model: Any, seq: int, micro: int, arguments: argparse.Namespace, rates: tuple[float, float]
) -> dict[str, Any]:
    import torch

    from benchmarks.lora import RANK, timed_steps
    from mixtral_run.train.data.samples import MockSamples, batches
    from mixtral_run.train.steps.adapter_adamw import AdapterAdamW
    from mixtral_run.train.steps.cuda_graph import backward_of
    from mixtral_run.train.steps.step import EagerBackward, train_step, trainable

    optimizer = AdapterAdamW(trainable(model), lr=1e-4, fused=True)
    samples = MockSamples(model.architecture.vocab_size, seq, 1)
    stream = batches(samples, seed=1, micro_batch_size=micro, global_batch_size=micro)
    with backward_of(model, seq * micro) as backward:

        def step() -> object:
            return train_step(model, optimizer, next(stream), 1.0, backward)

        seconds = timed_steps(step, 4, arguments.steps, in_a_row=True)
        kernels = on_gpu(recorded(step))
    for parameter in trainable(model):
        parameter.grad = None
    torch.cuda.empty_cache()
    eager = EagerBackward(model)
    train_step(model, optimizer, next(stream), 1.0, eager)
    dense = dense_by_shape(recorded(lambda: train_step(model, optimizer, next(stream), 1.0, eager)))
    for parameter in trainable(model):
        parameter.grad = None
    attention = arguments.attention_precision
    sizes = Step(arguments.layers, seq * micro, arguments.base_precision, rank=RANK, attention=attention)
    now: dict[str, list[float]] = {}
    others: dict[str, float] = {}
    for each in kernels:
        part = part_of(each["name"])
        now.setdefault(part, []).append(each["dur"] / 1e3)
        if part in ("other", "elementwise", "copies and fills"):
            others[each["name"][:110]] = others.get(each["name"][:110], 0.0) + each["dur"] / 1e3
    return {
        "size": f"{seq}x{micro}",
        "precision": arguments.base_precision,
        "attention": attention,
        "kernels": arguments.kernels,
        "step_ms": 1e3 * seconds,
        "tok_s": seq * micro / seconds,
        "parts": {part: (sum(times), len(times)) for part, times in now.items()},
        "floors": sizes.floors(*rates),
        "dense": dict(list(dense.items())[:12]),
        "others": dict(sorted(others.items(), key=lambda each: -each[1])[:12]),
    }


def show(found: dict[str, Any]) -> None:
    """Print the table as Markdown."""
    parts, floors = found["parts"], found["floors"]
    form = f"{found['precision']}, attention {found['attention']}, --kernels {found['kernels']}"
    print(f"\n{found['size']} {form}: {found['tok_s']:,.0f} tok/s")
    print("| part | floor ms | now ms | gap ms | kernels |\n|---|---|---|---|---|")
    for part, (now, count) in sorted(parts.items(), key=lambda each: floors.get(each[0], 0.0) - each[1][0]):
        floor = floors.get(part, 0.0)
        print(f"| {part} | {floor:.1f} | {now:.1f} | {now - floor:.1f} | {count} |")
    busy, count = sum(now for now, _ in parts.values()), sum(count for _, count in parts.values())
    print(f"| all kernels | {sum(floors.values()):.1f} | {busy:.1f} | {busy - sum(floors.values()):.1f} | {count} |")
    print(f"| between them | 0.0 | {found['step_ms'] - busy:.1f} | {found['step_ms'] - busy:.1f} | |")
    for name in ("dense", "others"):
        print(f"{name}: " + "; ".join(f"{key} {value:.2f}" for key, value in found[name].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sizes", default="2048x1,512x1", help="sequence length x micro batch, …")
    parser.add_argument("--base-precision", default="bf16", choices=("bf16", "fp8", "nf4"))
    parser.add_argument("--attention-precision", default="bf16", choices=("bf16", "fp8"))
    parser.add_argument("--kernels", default="auto", choices=("auto", "portable", "hopper"))
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()

    from benchmarks.lora import MODULES, build_ours
    from mixtral_run.config.launch import LaunchConfig
    from mixtral_run.model.parallel.mesh import open_mesh

    rates = ceilings()
    print(f"{rates[0] / 1e12:.0f} TFLOP/s, {rates[1] / 1e12:.2f} TB/s")
    results = []
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    with open_mesh(config) as mesh:
        precisions = arguments.base_precision, arguments.attention_precision
        model = build_ours(arguments.layers, mesh, "none", precisions[0], MODULES, arguments.kernels, precisions[1])
        for size in arguments.sizes.split(","):
            results.append(measure(model, *map(int, size.split("x")), arguments, rates))
            show(results[-1])
    print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()

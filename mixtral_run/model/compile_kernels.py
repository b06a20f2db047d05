"""Compile the kernels of a LoRA step before there is a GPU, so that the first run need not.

    python -m mixtral_run.model.compile_kernels FOLDER [--capabilities 8.0,8.6,9.0]

Neither Triton nor NVRTC needs a GPU. Each kernel is called as training Mixtral 8x7B calls it, with tensors that have no
memory, and Triton is stopped where it would launch. The folder is a cache of Triton's: an entry is found by the source,
the version of the compiler, the GPU and the arguments, so that another version compiles its own. What Triton compiles
in C, in order to launch kernels, is in it too (compile_launchers.py). The image holds such a folder, and
kernels/cache.py brings its entries into the cache that a job writes to.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.model.compile_launchers import Launchers, driver_library
from mixtral_run.model.dispatch.capacity import rows_with_room
from mixtral_run.model.kernels.requirements import Capability, KernelSet, kernel_set_of
from mixtral_run.model.kernels.selected import compiling_for

CAPABILITIES = ((8, 0), (8, 6), (9, 0))
EXPERTS = (8, 4, 2, 1)
"""Experts of a process, with expert parallelism over 1, 2, 4 and 8."""
TOKENS, RANK = 2048, 16
STEP_TOKENS = (512, 1024, 2048, 4096)
"""Numbers of tokens of a process in a micro batch. The kernels that sort choices are compiled for each of them."""

Call = Callable[[], object]


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def common_calls(experts: int) -> Iterator[Call]:
    """Yield the calls of kernels that all GPUs run, for `experts` of a process."""
    from mixtral_run.model.kernels import narrow_mm_triton as narrow
    from mixtral_run.model.kernels import norm_triton, permute_triton, rotary_triton, sort_triton, swiglu_triton
    from mixtral_run.model.kernels.loss import cross_entropy_triton
    from mixtral_run.model.kernels.optimizer import adamw_triton
    from mixtral_run.model.kernels.routing import router_triton

    shape = MIXTRAL_8X7B
    hidden, ffn, topk = shape.hidden_size, shape.ffn_hidden_size, shape.moe_router_topk
    heads = shape.num_attention_heads // shape.num_query_groups
    rows, offsets = TOKENS * topk, tensor(experts, dtype=torch.int32)
    whole = experts == shape.num_experts
    index, inverse = tensor(rows, dtype=torch.int64), tensor(TOKENS * topk, dtype=torch.int64)
    probs = tensor(TOKENS, topk, dtype=torch.float32)
    source = None if not whole else index
    tokens = tensor(TOKENS if whole else rows, hidden)
    if whole:
        angles = tensor(1, TOKENS, shape.kv_channels)
        mixed = (TOKENS, 1, shape.num_query_groups, heads + 2, shape.kv_channels)
        parts = [tensor(TOKENS, 1, count, shape.kv_channels) for count in (32, 8, 8)]
        for tokens_of_a_step in (512, 1024, 2048, 4096, 8192):
            choices = tensor(tokens_of_a_step * topk, dtype=torch.int64)
            yield partial(sort_triton.sort_choices, choices, shape.num_experts, topk)
        residual = tensor(TOKENS, hidden)
        yield partial(permute_triton.add_rows, tensor(rows, hidden), probs, inverse, topk, residual=residual)
        yield partial(permute_triton.add_rows, tensor(rows, hidden), None, inverse, topk)
        yield partial(permute_triton.spread, tensor(TOKENS, hidden), None, probs, inverse, rows)
        stream, weight, factors = tensor(TOKENS, hidden), tensor(hidden), tensor(TOKENS, dtype=torch.float32)
        for addition in (None, stream):
            yield partial(norm_triton.add_norm, stream, addition, weight, 1e-5)
        yield partial(norm_triton.add_norm_backward, stream, weight, factors, stream, stream)
        logits, labels = tensor(TOKENS, shape.vocab_size), tensor(TOKENS, dtype=torch.int64)
        yield partial(cross_entropy_triton.forward, logits, labels)
        yield partial(cross_entropy_triton.backward, logits, labels, factors, factors)
        for factor in (None, tensor(dtype=torch.float32)):
            chunks, table = tensor(2, 2, dtype=torch.int32), tensor(1, 10, dtype=torch.int64)
            groups, corrections = (tensor(1, width, dtype=torch.float32) for width in (8, 2))
            yield partial(adamw_triton.update, chunks, table, groups, corrections, factor)
        yield partial(router_triton.choose, tensor(TOKENS, experts, dtype=torch.float32), topk)
        chosen = tensor(TOKENS, topk, dtype=torch.int64)
        yield partial(router_triton.route_backward, probs, chosen, probs, tensor(experts, hidden), residual)
        yield partial(rotary_triton.split_and_rotate, tensor(*mixed), angles, angles)
        yield partial(rotary_triton.rotate_back_and_join, parts, torch.Size(mixed), angles, angles)
    inner, wide = tensor(rows, RANK), tensor(rows, 2 * ffn)
    first_in, first_out = tensor(experts, RANK, hidden), tensor(experts, 2 * ffn, RANK)
    second_in, second_out = tensor(experts, RANK, ffn), tensor(experts, hidden, RANK)
    fp32 = torch.float32
    yield partial(narrow.narrow_product, tokens, first_in.transpose(1, 2), offsets, source)
    yield partial(swiglu_triton.forward, wide, inner, first_out, 2.0, offsets)
    yield partial(narrow.narrow_product, tensor(rows, ffn), second_in.transpose(1, 2), offsets)
    yield partial(narrow.narrow_added, tensor(rows, hidden), inner, second_out, 1.0, offsets, in_place=True)
    yield partial(narrow.narrow_product, tensor(rows, hidden), second_out, offsets)
    yield partial(narrow.narrow_outer_product, tensor(rows, hidden), inner, offsets, narrow_first=False, dtype=fp32)
    given = (wide, inner, first_out, 2.0, offsets, tensor(rows, ffn), tensor(rows, dtype=torch.float32))
    for quantized_by in (None, tensor(experts, 2 * ffn, dtype=fp32)):
        order = index if whole else None
        yield partial(swiglu_triton.recomputing_backward, *given, quantized_by, order)
    yield partial(narrow.narrow_outer_product, tensor(rows, ffn), inner, offsets, narrow_first=True, dtype=fp32)
    if narrow.both_pay(wide):
        yield partial(narrow.both_narrow_products, wide, first_out, inner, 2.0, offsets, fp32)
    yield partial(narrow.narrow_product, wide, first_out, offsets)
    yield partial(narrow.narrow_outer_product, wide, inner, offsets, narrow_first=False, dtype=fp32)
    yield partial(narrow.narrow_outer_product, tokens, inner, offsets, narrow_first=True, source=source, dtype=fp32)
    for out in (tensor(rows, hidden), tensor(rows, ffn)):
        half = tensor(experts, RANK, out.shape[1]).transpose(1, 2)
        yield partial(narrow.narrow_added, out, inner, half, 1.0, offsets, in_place=True)


def exchange_calls(experts: int) -> Iterator[Call]:
    """Yield the calls of kernels that bring tokens to `experts` of a process and back, if other processes have more:
    through symmetric memory, and by all-gather.
    """
    from mixtral_run.model.kernels import permute_triton, sort_triton
    from mixtral_run.model.kernels import symmetric_memory_triton as memory

    shape = MIXTRAL_8X7B
    hidden, topk, size = shape.hidden_size, shape.moe_router_topk, shape.num_experts // experts
    if size == 1:
        return
    int32, int64, fp32 = torch.int32, torch.int64, torch.float32
    addresses, overflow = tensor(size, dtype=int64), tensor(dtype=int64)
    for tokens in STEP_TOKENS:
        rows = rows_with_room(tokens * topk * size, size)
        for first in range(0, shape.num_experts, experts):
            own = range(first, first + experts)
            yield partial(
                sort_triton.route, addresses, addresses, (tokens, topk), shape.num_experts, own, rows, overflow
            )
        yield partial(sort_triton.sort_choices, tensor(size * tokens * topk, dtype=int64), experts + 1, topk)
    tokens, rows = TOKENS, rows_with_room(TOKENS * topk * size, size)
    routes = sort_triton.Routes(
        source=tensor(rows, dtype=int32),
        row_probs=tensor(rows, dtype=fp32),
        offsets=tensor(experts, dtype=int32),
        inverse=tensor(size * tokens, topk, dtype=int32),
        starts=tensor(size, dtype=int32),
        experts=tensor(size * tokens, topk, dtype=int32),
    )
    like, outputs, probs = tensor(tokens, hidden), tensor(rows, hidden), tensor(tokens, topk, dtype=fp32)
    for weighted in (False, True):
        yield partial(memory.fetch, addresses, routes, tokens, like, weighted=weighted)
    yield partial(memory.put, outputs, routes, tensor(rows * hidden))
    for factors in (None, probs):
        yield partial(memory.sum_rows, addresses, routes, slice(0, tokens), factors, outputs)
    yield partial(memory.pick, addresses, routes, slice(0, tokens))
    everyone = (tensor(size * tokens, topk, dtype=fp32), tensor(size * tokens * topk, dtype=int64))
    end = routes.offsets[-1:]
    for factors in (everyone[0], None):
        yield partial(permute_triton.add_rows, outputs, factors, everyone[1], topk, end)
    yield partial(permute_triton.spread, tensor(size * tokens, hidden), None, *everyone, rows, end)


def weight_calls(experts: int, capability: Capability) -> Iterator[Call]:
    """Yield the calls of the products with frozen weights, in all precisions."""
    from mixtral_run.model.kernels.quantized import nf4_triton, quantized_mm_triton

    hidden, ffn = MIXTRAL_8X7B.hidden_size, MIXTRAL_8X7B.ffn_hidden_size
    rows, offsets = TOKENS * MIXTRAL_8X7B.moe_router_topk, tensor(experts, dtype=torch.int32)
    fp8, fp32 = torch.float8_e4m3fn, torch.float32
    for outputs, inputs in ((2 * ffn, hidden), (hidden, ffn)):
        codes = tensor(experts, outputs, inputs // 2, dtype=torch.uint8)
        scales = tensor(experts, outputs, inputs // 64)
        yield partial(nf4_triton.expand, codes, scales)
    if kernel_set_of(capability) is KernelSet.PORTABLE:
        yield from _portable_calls(experts)
        values, scales = tensor(experts, hidden, ffn, dtype=fp8), tensor(experts, hidden, dtype=fp32)
        yield partial(quantized_mm_triton.expand, values, scales)
        return
    row_scales, source = tensor(rows, dtype=fp32), tensor(rows, dtype=torch.int64)
    yield partial(quantized_mm_triton.quantize_rows, tensor(TOKENS, hidden), None, offsets, source)
    if experts == MIXTRAL_8X7B.num_experts:
        # Attention and the output layer in 8 bit (dense_mm.py).
        yield partial(quantized_mm_triton.quantize_rows, tensor(TOKENS, hidden), None, None)
        for width in (MIXTRAL_8X7B.qkv_size, hidden, MIXTRAL_8X7B.vocab_size):
            columns = tensor(1, width, dtype=fp32)
            yield partial(quantized_mm_triton.quantize_rows, tensor(TOKENS, width), columns, None)
    for outputs, inputs in ((2 * ffn, hidden), (hidden, ffn)):
        scales = tensor(experts, outputs, dtype=fp32)
        yield partial(quantized_mm_triton.quantize_rows, tensor(rows, inputs), None, offsets)
        yield partial(quantized_mm_triton.quantize_rows, tensor(rows, outputs), scales, offsets)
        yield partial(quantized_mm_triton.quantize_with, tensor(rows, outputs), scales, row_scales, offsets)


def _portable_calls(experts: int) -> Iterator[Call]:
    from mixtral_run.model.kernels.portable_mm_triton import TILES, grouped_product

    hidden, ffn = MIXTRAL_8X7B.hidden_size, MIXTRAL_8X7B.ffn_hidden_size
    offsets = tensor(experts, dtype=torch.int32)
    for tiles in TILES:
        rows = experts * min(tiles.most_rows, 512)
        first, second = tensor(experts, 2 * ffn, hidden), tensor(experts, hidden, ffn)
        first_in, second_in = tensor(experts, RANK, hidden), tensor(experts, RANK, ffn)
        second_out, inner = tensor(experts, hidden, RANK).transpose(1, 2), tensor(rows, RANK)
        whole = experts == MIXTRAL_8X7B.num_experts
        source = tensor(rows, dtype=torch.int64) if whole else None
        calls: tuple[tuple[Any, ...], ...] = (
            (tensor(rows, hidden), first.transpose(1, 2), offsets, None, source),
            (tensor(rows, ffn), second.transpose(1, 2), offsets, (inner, second_out)),
            (tensor(rows, hidden), second, offsets, (inner, second_in)),
            (tensor(rows, 2 * ffn), first, offsets, (inner, first_in)),
        )
        for arguments in calls:
            yield partial(grouped_product, *arguments)


class _NoGpu:
    """A driver for Triton that knows which GPU to compile for, and has none."""

    def __init__(self, capability: Capability) -> None:
        self._capability = capability
        self.utils: Any = None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self._capability[0] + self._capability[1], 32)


def compile_for(case: tuple[Capability, int]) -> list[str]:
    """Compile all kernels for a compute capability and so many experts of a process, into this process's cache.

    It changes Triton for the whole process. Returns what could not be compiled; a run then compiles it itself.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    capability, experts = case
    launch, launchers = JITFunction.run, Launchers()

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **kinds: Any) -> Any:
        del warmup
        kernel = launch(self, *arguments, grid=grid, warmup=True, **kinds)
        launchers.compile(kernel)
        return kernel

    JITFunction.run = only_compile
    no_gpu = _NoGpu(capability)
    driver.set_active(no_gpu)
    failed = []
    try:
        no_gpu.utils = launchers.utils()
        calls = (common_calls(experts), exchange_calls(experts), weight_calls(experts, capability))
        with compiling_for(capability):
            for call in itertools.chain(*calls):
                try:
                    call()
                except Exception as error:
                    failed.append(f"{type(error).__name__}: {error}".splitlines()[0])
        if capability == (9, 0) and experts == EXPERTS[0]:
            from mixtral_run.model.kernels.csrc.build import compiled

            for bits in (16, 8):
                compiled(bits)
    except ImportError as error:
        failed.append(str(error))
    finally:
        JITFunction.run = launch
    failed += launchers.failed
    return [f"compute capability {capability[0]}.{capability[1]}: {each}" for each in failed]


def main() -> None:
    """Compile for all capabilities, side by side, and print how many kernels there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--capabilities", default=",".join(f"{major}.{minor}" for major, minor in CAPABILITIES))
    arguments = parser.parse_args()
    numbers = (each.split(".") for each in arguments.capabilities.split(","))
    capabilities = [(int(major), int(minor)) for major, minor in numbers]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRITON_CACHE_DIR": str(arguments.folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}
    try:
        import triton
    except ImportError:
        print("No kernels are compiled: this torch has no Triton.")
        return
    with driver_library(), multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 8)) as pool:
        failed = pool.map(compile_for, itertools.product(capabilities, EXPERTS), chunksize=1)
    for line in sorted(set(itertools.chain.from_iterable(failed))):
        print(f"not compiled: {line}", file=sys.stderr)
    count = len(list(arguments.folder.iterdir()))
    print(f"{count} kernels compiled with Triton {triton.__version__} in {arguments.folder}")


if __name__ == "__main__":
    main()

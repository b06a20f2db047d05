"""The longest row of one side: built once, and measured at one length after the other until memory ends."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from benchmarks.rivals.table import RIVALS, versions

STEPS = ((8192, 3, 5), (32768, 1, 3), (65536, 1, 2))
"""Rows shorter than the first number: steps to warm up, and steps timed. From 65,536 tokens on it is one of each."""

StepOf = Callable[[int], AbstractContextManager[Callable[[], object]]]


def longest(side: str, lengths: list[int], arguments: argparse.Namespace) -> None:
    """Print a line for each length that fits, and one for the first that does not."""
    if side == "ours":
        measure_ours(lengths, arguments)
        return
    # Before anything else imports transformers: a rival changes it.
    ready = importlib.import_module(RIVALS[side].module).prepare(arguments.layers, max(lengths), arguments)

    from benchmarks.rivals.harness import Steps, prove

    print(f"{side} {versions(side)}, gradient checkpointing: {arguments.rival_checkpointing}", flush=True)
    steps = Steps(ready)
    print(prove(ready, steps, 512, arguments), flush=True)

    @contextmanager
    def step_of(seq: int) -> Iterator[Callable[[], object]]:
        yield lambda: steps.step(seq, 1)

    measure_lengths(lengths, step_of)


def measure_ours(lengths: list[int], arguments: argparse.Namespace) -> None:

    from benchmarks.lora import build_ours, modules_of
    from mixtral_run.config.launch import LaunchConfig
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.data.samples import MockSamples, batches
    from mixtral_run.train.steps.adapter_adamw import AdapterAdamW
    from mixtral_run.train.steps.cuda_graph import backward_of
    from mixtral_run.train.steps.step import train_step, trainable

    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    with open_mesh(config) as mesh:
        precision, kernels = arguments.base_precision, arguments.kernels
        model = build_ours(arguments.layers, mesh, arguments.recompute, precision, modules_of(arguments), kernels)
        optimizer = AdapterAdamW(trainable(model), lr=1e-4, fused=True)
        print(f"ours, base {precision}, --recompute {arguments.recompute}", flush=True)

        @contextmanager
        def step_of(seq: int) -> Iterator[Callable[[], object]]:
            vocabulary = model.architecture.vocab_size
            stream = batches(MockSamples(vocabulary, seq, 1), seed=1, micro_batch_size=1, global_batch_size=1)
            with backward_of(model, seq, captured=not arguments.eager) as backward:
                yield lambda: train_step(model, optimizer, next(stream), 1.0, backward)

        measure_lengths(lengths, step_of)


def measure_lengths(lengths: list[int], step_of: StepOf) -> list[dict[str, Any]]:
    """Time steps with one row of each length until memory ends; print and return a result for each."""
    import torch

    from benchmarks.lora import timed_steps

    found: list[dict[str, Any]] = []
    for seq in lengths:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        warm_up, count = next(((warm, timed) for below, warm, timed in STEPS if seq < below), (1, 1))
        try:
            with step_of(seq) as step:
                seconds = timed_steps(step, warm_up, count)
        except torch.OutOfMemoryError:
            print(f"{seq:>8} out of memory", flush=True)
            found.append({"seq": seq, "out_of_memory": True})
            break
        peak = torch.cuda.max_memory_reserved() / 1024**3 if on_gpu else float("nan")
        print(f"{seq:>8} {seq / seconds:>10,.0f} tok/s {peak:>7.1f} GiB", flush=True)
        found.append({"seq": seq, "tok_s": seq / seconds, "peak_gib": peak})
    return found

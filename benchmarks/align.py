"""Speed and memory of `align` beside supervised LoRA of as many tokens, many cases from one built model.

    python -m benchmarks.align [--base-precision bf16|fp8|nf4] [--cases sft,sft:eager,dpo,dpo:eager,kto,…]
        [--seq-lengths 2048,512] [--rows 2] [--passes 1] [--layers 32 --hidden-size 4096 …]

A case is sft or a method, run as the command does: the planner chooses the recomputation for the free memory of the
GPU, and passes are captured as CUDA graphs. :eager behind it launches each kernel from the host. A pass has --rows
full rows: both answers of --rows / 2 pairs, or --rows answers with kto and samples with sft. Weights and tokens
are random, and B of each adapter starts at 0, so that the first loss of dpo is 0.6931, that of kto 0.5 and that of sft
about the logarithm of the vocabulary.

One JSON object a case; a case that does not fit says so and the next one runs.

    tok_s            tokens of the rows that are learned from, of both answers of a pair, over a step's median time.
                     Passes without gradients (kto's over mismatched answers) take time, but add no tokens.
    reference_tok_s  the same of the reference's log-probabilities, which are computed once before the first step,
                     timed after a pass that compiles the kernels
    peak_gib, allocated_gib    most that torch reserved and allocated, the reference included; null on a CPU
    planned_gib      what the plan counts of it, without the CUDA context
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

SFT = "sft"
CASES = "sft,sft:eager,dpo,dpo:eager,kto,kto:eager,orpo,simpo"
WARM_UP = 3
EXECUTIONS = {"eager": False, "captured": True}


def config_of(case: str, seq_length: int, arguments: argparse.Namespace) -> Any:
    """The settings of the command; those that are left to the planner are chosen for the GPU as it is now."""
    from mixtral_run.config.verbs.align import AlignConfig, rows_per_sample
    from mixtral_run.config.verbs.training import FinetuneConfig
    from mixtral_run.planner.choose import settled

    method, _, execution = case.partition(":")
    if arguments.rows % 2:
        raise SystemExit(f"--rows: expected an even number, as a pair is two rows; found {arguments.rows}")
    if execution and execution not in EXECUTIONS:
        raise SystemExit(f"--cases: expected METHOD, METHOD:eager or METHOD:captured; found {case}")
    micro = arguments.rows // rows_per_sample(None if method == SFT else method)
    common: dict[str, Any] = {
        "load": Path("random"),
        "save": Path("nowhere"),
        "base_precision": arguments.base_precision,
        "device": arguments.device,
        "nproc_per_node": 1,
        "tensor_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "seq_length": seq_length,
        "micro_batch_size": micro,
        "global_batch_size": micro * arguments.passes,
        "train_iters": WARM_UP + arguments.steps,
    }
    if method == SFT:
        config: Any = FinetuneConfig(mock_data=True, **common).check()
    else:
        config = AlignConfig(method=method, data_path=("random",), **common).check()
    graphs = EXECUTIONS[execution] if execution else config.cuda_graphs
    return settled(dataclasses.replace(config, cuda_graphs=graphs), base_of(arguments))


def base_of(arguments: argparse.Namespace) -> Any:
    from benchmarks.make_mixtral import scaled
    from mixtral_run.weights.manifest.describe import BaseDescription

    sizes = (arguments.layers, arguments.hidden_size, arguments.ffn_hidden_size, arguments.vocab_size)
    dtype = "float32" if arguments.device == "cpu" else "bfloat16"
    return BaseDescription(Path("random"), scaled(*sizes), dtype, "random")


def preferences(config: Any, vocabulary: int, seed: int, folder: Path) -> Any:
    """As many preferences as the run takes: random prompts of half a row, each with answers that fill the other half.

    folder: gets the reference's log-probabilities.
    """
    import numpy as np

    from mixtral_run.train.data.cache.token_arrays import TokenArrays
    from mixtral_run.train.data.preferences import PreferenceSamples
    from mixtral_run.train.data.templates.encoded import EncodedExample

    random = np.random.default_rng(seed)
    length, prompt = config.seq_length + 1, (config.seq_length + 1) // 2
    paired = config.rows_per_sample == 2
    samples = config.train_iters * config.global_batch_size
    encoded = []
    for _ in range(samples if paired else -(-samples // 2)):
        start = random.integers(3, vocabulary, prompt, np.int32)
        for _ in ("chosen", "rejected"):
            tokens = np.concatenate([start, random.integers(3, vocabulary, length - prompt, np.int32)])
            encoded.append(EncodedExample(tokens, ((prompt, length),)))
    places = [f"line {number // 2 + 1}" for number in range(len(encoded))]
    return PreferenceSamples(
        TokenArrays.of(places, encoded), config.seq_length, 2, "random", None, paired=paired, packs=False, folder=folder
    )


def add_timed_references(model: Any, config: Any, samples: Any) -> float:
    """Give the samples their log-probabilities by the reference; returns the tokens a second."""
    from mixtral_run.model.without_adapters import without_adapters
    from mixtral_run.terminal.report import Report
    from mixtral_run.train.preferences.passes import training_passes
    from mixtral_run.train.preferences.reference import add_references

    passes = list(training_passes(samples, config, 0, 1))
    for part in (passes[:1], passes):
        started = time.perf_counter()
        add_references(config, "random", partial(without_adapters, model), model, samples, part, Report.silent())
    seconds = time.perf_counter() - started
    rows = config.micro_batch_size * config.rows_per_sample
    return (len(passes) - 1) * rows * config.seq_length / seconds


def run_case(model: Any, kept: list[Any], config: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.lora import timed_steps
    from mixtral_run.config.verbs.align import AlignConfig
    from mixtral_run.planner.workload import GIB
    from mixtral_run.train.data.samples import MockSamples, batches
    from mixtral_run.train.preferences.prepare import objective_of
    from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of
    from mixtral_run.train.steps.step import adapter_optimizer, optimizer_step, trainable

    prepare(model, kept, config)
    vocabulary, on_gpu = model.architecture.vocab_size, model.mesh.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    losses: list[float] = []
    tokens = arguments.rows * config.seq_length
    with tempfile.TemporaryDirectory() as folder:
        samples: Any = MockSamples(vocabulary, config.seq_length, arguments.seed)
        if isinstance(config, AlignConfig):
            samples = preferences(config, vocabulary, arguments.seed, Path(folder))
            if config.has_reference:
                found["reference_tok_s"] = round(add_timed_references(model, config, samples))
        stream = batches(
            samples,
            seed=config.seed,
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
        )
        optimizer = adapter_optimizer(model, config)
        with backward_of(model, tokens, captured=config.cuda_graphs, objective=objective_of(config)) as backward:
            step = optimizer_step(model, optimizer, config.max_norm, backward)

            def one() -> None:
                losses.append(step(next(stream), config.lr).loss)

            seconds = timed_steps(one, WARM_UP, arguments.steps, in_a_row=True)
            is_captured = isinstance(backward, CapturedBackward)
    for parameter in trainable(model):
        parameter.grad = None
    peaks = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()) if on_gpu else (None, None)
    return {
        "captured": is_captured,
        "recompute": config.recomputation,
        "tokens": tokens * arguments.passes,
        "tok_s": round(tokens * arguments.passes / seconds),
        **found,
        **{
            name: peak if peak is None else round(peak / GIB, 3)
            for name, peak in zip(("peak_gib", "allocated_gib"), peaks, strict=True)
        },
        "planned_gib": round(planned_bytes(config, base_of(arguments)) / GIB, 3),
        "losses": [round(each, 6) for each in (losses[0], losses[-1])],
    }


def prepare(model: Any, kept: list[Any], config: Any) -> None:
    """Set the adapters back, and the recomputation to that of the config."""
    import torch

    from mixtral_run.train.steps.step import trainable

    chunks = config.expert_chunks or 1
    model.recompute(config.recomputation, config.recompute_layers)
    model.settings = dataclasses.replace(model.settings, expert_chunks=chunks)
    with torch.no_grad():
        for parameter, start in zip(trainable(model), kept, strict=True):
            parameter.copy_(start)


def planned_bytes(config: Any, base: Any) -> float:
    from mixtral_run.config.gpus import HOPPER
    from mixtral_run.planner.available import available_gpu
    from mixtral_run.planner.choose import workload_of
    from mixtral_run.planner.memory_model import memory
    from mixtral_run.planner.workload import Layout

    gpu = available_gpu(config.device, 1)
    workload = workload_of(config, base, 1, gpu.compute_capability if gpu is not None else HOPPER)
    layout = Layout(1, 1, config.recomputation, 1, config.expert_chunks or 1, config.recompute_layers)
    return memory(workload, layout).allocated


def built_model(config: Any, arguments: argparse.Namespace, mesh: Any) -> Any:
    """The model as the command builds it, with random weights. B of its adapters is 0."""
    import torch

    from benchmarks.lora import random_model
    from mixtral_run.model.adapters.lora_settings import LoraSettings
    from mixtral_run.model.mixtral import ModelSettings
    from mixtral_run.train.load_model import pick_dtype

    base = base_of(arguments)
    dtype = pick_dtype(config.dtype, base, mesh.device)
    settings = ModelSettings(
        dtype, True, LoraSettings.from_config(config), "none", config.base_precision, config.kernels
    )
    model = random_model(base.architecture, settings, mesh)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".linear_out" in name:
                parameter.zero_()
    # As the command does by default.
    model.count_choices()
    return model


def measured_cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    from mixtral_run.errors import MixtralRunError
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.steps.step import trainable

    # Before the model takes the memory that the planner counts with.
    configs: dict[tuple[int, str], Any] = {}
    for seq_length, case in itertools.product(map(int, arguments.seq_lengths.split(",")), arguments.cases.split(",")):
        try:
            configs[seq_length, case] = config_of(case, seq_length, arguments)
        except MixtralRunError as error:
            configs[seq_length, case] = str(error)
    usable = [each for each in configs.values() if not isinstance(each, str)]
    if not usable:
        raise SystemExit("\n".join(map(str, configs.values())))
    with open_mesh(usable[0]) as mesh:
        model = built_model(usable[0], arguments, mesh)
        # On the host: the peaks are those of a run.
        kept = [parameter.detach().cpu().clone() for parameter in trainable(model)]
        for (seq_length, case), config in configs.items():
            try:
                result = {"failed": config} if isinstance(config, str) else run_case(model, kept, config, arguments)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                result = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            for parameter in trainable(model):
                parameter.grad = None
            gc.collect()
            yield {"case": case, "base": arguments.base_precision, "seq_length": seq_length, **result}


def main(words: Sequence[str] | None = None) -> None:
    from benchmarks.make_mixtral import add_size_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, layers=32, hidden_size=4096, ffn_hidden_size=14336)
    parser.add_argument("--base-precision", default="bf16", choices=("bf16", "fp8", "nf4"))
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--seq-lengths", default="2048", help="tokens of a row, separated by commas")
    parser.add_argument("--rows", type=int, default=2, help="of a pass; an even number")
    parser.add_argument("--passes", type=int, default=1, help="micro batches of a step")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, behind those that warm up")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    for found in measured_cases(parser.parse_args(words)):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()

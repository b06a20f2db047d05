"""Started by torchrun: the time from an HF directory, or from a checkpoint, to the first iteration of LoRA.

The last line that rank 0 prints is a JSON object: seconds for building the model, for reading the weights into it (the
slowest rank's), and for the first iteration.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.checkpoint import load_base
from mixtral_run.train.data.samples import batches
from mixtral_run.train.data.sources import open_data
from mixtral_run.train.steps.step import train_step, trainable
from mixtral_run.weights.manifest.describe import describe_base


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=64)
    options = parser.parse_args()
    config = FinetuneConfig(
        load=options.source,
        save=Path("unused"),
        mock_data=True,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        expert_model_parallel_size=options.expert_model_parallel_size,
        seq_length=options.seq_length,
        dtype="bf16",
    )
    with open_mesh(config) as mesh:
        seconds = measure(config, mesh)
        if mesh.is_first:
            print(json.dumps(seconds), flush=True)


def measure(config: FinetuneConfig, mesh: Mesh) -> dict[str, float]:
    """Seconds of each part, every one of them from when all ranks had ended the one before. All ranks must call."""
    base = describe_base(config.load)
    lora = LoraSettings(16, 32.0, 0.0, LORA_TARGET_MODULES, config.seed)
    marks = [_now(mesh)]
    model = build_model(base.architecture, ModelSettings(torch.bfloat16, True, lora, recompute="full"), mesh).train()
    marks.append(_now(mesh))
    load_base(model, base)
    marks.append(_now(mesh))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, fused=True)
    stream = batches(
        open_data(config, base, Report.silent()).samples,
        seed=config.seed,
        micro_batch_size=1,
        global_batch_size=mesh.data_size,
        data_parallel_rank=mesh.data_rank,
        data_parallel_size=mesh.data_size,
        consumed_samples=0,
    )
    result = train_step(model, optimizer, next(iter(stream)), 1.0)
    assert result.loss == result.loss, "the first loss is no number"
    marks.append(_now(mesh))
    names = ("build_seconds", "load_seconds", "first_iteration_seconds")
    return {name: end - begin for name, begin, end in zip(names, marks[:-1], marks[1:], strict=True)}


def _now(mesh: Mesh) -> float:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

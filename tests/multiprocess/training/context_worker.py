"""Run under torchrun: a few steps in layouts with context parallelism, written as JSON.

torchrun … context_worker.py CHECKPOINT OUT.json TPxEPxCP [TPxEPxCP …]
"""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model import mixtral
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.parallel.mesh import Mesh, open_mesh, seed_everything, sum_over
from mixtral_run.train.data.samples import Row
from mixtral_run.train.steps.step import EagerBackward, losses_of, sum_gradients, trainable
from mixtral_run.train.validation import micro_batch
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from tests.multiprocess.training import layouts_worker
from tests.multiprocess.training.layouts_worker import UnevenSamples, config_of, train, validation_losses
from tests.support.adapters import save_adapter
from tests.support.live_tensors import LiveTensors

LENGTHS = ((5, 9, 2), (1, 15), (16,))


class PackedRows(UnevenSamples):
    """Rows of several samples, whose boundaries lie inside chunks and between them."""

    def row(self, index: int) -> Row:
        return dataclasses.replace(super().row(index), lengths=LENGTHS[index % len(LENGTHS)])


def layout_of(checkpoint: Path, out: Path, layout: str, **settings: Any) -> FinetuneConfig:
    tp_ep, _, context = layout.rpartition("x")
    return config_of(checkpoint, out, tp_ep, context_parallel_size=int(context), micro_batch_size=4, **settings)


def run_with(kind: type[UnevenSamples], config: FinetuneConfig, mesh: Mesh, stop: int, **given: Any) -> dict[str, Any]:
    samples = kind(describe_base(config.load).architecture.vocab_size, config.seq_length, config.seed)
    with patch.object(layouts_worker, "samples_of", lambda _: samples):
        return train(config, mesh, 0, stop, **given)


def gradients(model: MixtralModel, kind: type[UnevenSamples]) -> dict[str, list[float]]:
    """Return the adapters' gradients of two rows at once, summed over the ranks. All ranks must call."""
    mesh = model.mesh
    samples = kind(model.architecture.vocab_size, 16, 5)
    parameters = trainable(model)
    for parameter in parameters:
        parameter.grad = None
    # Every replica takes the same rows.
    EagerBackward(model)(micro_batch(samples, (0, 1)), 20 * mesh.data_size)
    sum_gradients(parameters, mesh)
    return {
        name: each.grad.double().flatten().tolist()
        for name, each in model.named_parameters()
        if is_adapter(name) and each.grad is not None
    }


def left_after_steps(model: MixtralModel) -> list[str]:
    """Return what made each tensor that exists after two passes of each degree of recomputation, with Python's garbage
    collector off, besides weights, gradients and the counts of the routers. All ranks must call.
    """
    micro = micro_batch(PackedRows(model.architecture.vocab_size, 16, 5), (0, 1))
    layers, found = model.gpt.decoder.layers, []
    gc.disable()
    for mode in ("none", "selective", "except-attention", "full"):
        for layer in layers:
            layer.recompute = mode
        with LiveTensors() as live:
            for _ in range(2):
                EagerBackward(model)(micro, 20)
            gradients = [each.grad for each in model.parameters() if each.grad is not None]
            inputs = [each for each in vars(micro).values() if isinstance(each, torch.Tensor)]
            counts = vars(model.router_counts).values() if model.router_counts is not None else ()
            inputs += [each for each in counts if isinstance(each, torch.Tensor)]
            kept = [*model.parameters(), *gradients, *inputs]
            # gloo's thread lets go of a collective's tensors a moment after it has reported its end.
            end = time.monotonic() + 10
            while (left := live.besides(kept)) and time.monotonic() < end:
                time.sleep(0.02)
            found += left
    gc.enable()
    return found


def run_layout(checkpoint: Path, out: Path, layout: str, saved: Path | None) -> dict[str, Any]:
    config = layout_of(checkpoint, out, layout)
    results: dict[str, Any] = {}
    with open_mesh(config) as mesh:
        for kind in (UnevenSamples, PackedRows):
            run = run_with(kind, config, mesh, 3)
            results[kind.__name__] = {"figures": run["figures"], "router": run["router"]}
            results[kind.__name__]["gradients"] = gradients(run["model"], kind)
        model = run["model"]
        results["validation"] = validation_losses(config, model, 1)
        with torch.no_grad():
            rows = PackedRows(model.architecture.vocab_size, 16, 99)
            losses = losses_of(model, micro_batch(rows, (0, 1, 2))).double()
            results["packed_validation"] = float(summed(losses, mesh)) / mesh.data_size
        results["logits"] = model.eval().logits(torch.arange(8)[None])[0].double().tolist()
        results["left"] = left_after_steps(run["model"].train())
        for mode in ("selective", "except-attention", "full"):
            again = run_with(PackedRows, layout_of(checkpoint, out, layout, recompute=mode), mesh, 1)
            results[mode] = again["figures"]
        again = run_with(PackedRows, layout_of(checkpoint, out, layout, expert_chunks=3), mesh, 1)
        results["expert_chunks"] = again["figures"]
        with patch.object(mixtral, "MOST_LOGITS", 3):
            results["chunked"] = run_with(PackedRows, config, mesh, 1)["figures"]
        dropped = []
        for mode in ("none", "full", "except-attention"):
            seed_everything(1, mesh.rank)
            config_dropped = layout_of(checkpoint, out, layout, recompute=mode, lora_dropout=0.3)
            dropped.append(run_with(PackedRows, config_dropped, mesh, 1)["figures"])
        results["dropout"] = dropped
        if saved is None:
            half = run_with(PackedRows, config, mesh, 2)
            description = {
                "lora": {"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules": list(config.lora_target_modules)},
                "base": {"fingerprint": describe_base(checkpoint).fingerprint},
            }
            save_adapter(half["model"], half["optimizer"], out, 2, description)
        else:
            assert describe_adapter(saved).iteration == 2
            samples = PackedRows(model.architecture.vocab_size, config.seq_length, config.seed)
            with patch.object(layouts_worker, "samples_of", lambda _: samples):
                results["resumed"] = train(config, mesh, 2, 3, resume=saved)["figures"]
    return results


def summed(total: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the sum over all ranks that have different tokens. All ranks must call."""
    return sum_over(total, mesh.data_group)


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    layouts_worker.main(run_layout)

"""Run under torchrun: losses and figures of `align` in a layout, written as JSON.

torchrun … preferences_worker.py BASE DATA_FOLDER OUT.json METHOD TPxEP
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.samples import batches
from mixtral_run.train.data.sources import open_data_everywhere
from mixtral_run.train.load_model import load_for_training
from mixtral_run.train.metrics import Meter
from mixtral_run.train.preferences.prepare import objective_of, prepare_references
from mixtral_run.train.run import Run
from mixtral_run.train.steps.bad_steps import BadSteps
from mixtral_run.train.steps.step import EagerBackward, optimizer_step, trainable
from mixtral_run.train.validation import Validation
from mixtral_run.weights.manifest.describe import describe_base


def main(base: str, data: str, out: str, method: str, layout: str) -> None:
    tp, ep = map(int, layout.split("x"))
    file = str(Path(data) / ("labels.jsonl" if method == "kto" else "pairs.jsonl"))
    config = AlignConfig(
        load=Path(base), save=Path(out).parent / f"{Path(out).stem}-save", data_path=(file,), valid_data_path=(file,),
        method=method, tensor_model_parallel_size=tp, expert_model_parallel_size=ep, device="cpu", dtype="fp32",
        seq_length=32, global_batch_size=4, train_iters=3, lr=1e-2, min_lr=1e-2, beta=0.5, pack=method == "kto",
    ).check()  # fmt: skip
    described = describe_base(config.load)
    with open_mesh(config) as mesh:
        model = load_for_training(
            config, described, mesh, LoraSettings(4, 8.0, 0.0, config.lora_target_modules, 1), recompute="none"
        )
        loaded = open_data_everywhere(config, described, Report.silent())
        objective = objective_of(config)
        optimizer = torch.optim.AdamW(trainable(model), lr=config.lr)
        step = optimizer_step(model, optimizer, config.clip_grad, EagerBackward(model, objective=objective))
        meter = Meter(
            train_iters=3, global_batch_size=4, seq_length=32, world_size=mesh.world_size, flops_per_token=1.0,
            device=mesh.device, file=None,
        )  # fmt: skip
        run = Run(
            config, mesh, Report.silent(), model, loaded, meter, step, 0.0, BadSteps(config, mesh, Report.silent())
        )
        prepare_references(run, config, dataclasses.replace(described, fingerprint=layout))
        stream = batches(
            loaded.samples, seed=config.seed, micro_batch_size=1, global_batch_size=4,
            data_parallel_rank=mesh.data_rank, data_parallel_size=mesh.data_size,
        )  # fmt: skip
        lines = []
        for _, batch in zip(range(3), stream, strict=False):
            result = step(batch, config.lr)
            lines.append({"loss": result.loss, "grad_norm": result.grad_norm, **result.figures})
        assert loaded.validation is not None
        found = Validation(loaded.validation, 1, Report.silent(), None, objective).evaluate(model, 3, lambda: False)
        assert found is not None
        lines.append(found.to_mapping() | {"seconds": 0.0})
        if mesh.is_first:
            Path(out).write_text(json.dumps(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])

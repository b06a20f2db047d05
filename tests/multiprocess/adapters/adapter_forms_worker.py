"""Run under torchrun: train, save and load adapters of every form in one layout; losses and logits written as JSON.

torchrun … adapter_forms_worker.py CHECKPOINT OUT_FOLDER TPxEP [SAVED_ELSEWHERE]
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.train.checkpoints.checkpoint import load_adapter, load_optimizer
from mixtral_run.train.data.samples import batches
from mixtral_run.train.load_model import load_for_inference, load_for_training
from mixtral_run.train.steps.step import EagerBackward, adapter_optimizer, optimizer_step
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from tests.multiprocess.training.layouts_worker import config_of, samples_of
from tests.support.adapters import save_adapter

PARTLY = ("linear_qkv", "linear_proj", "linear_fc1")
"""Without one of the experts' layers: their products are separate nodes of autograd."""
FORMS: dict[str, dict[str, Any]] = {
    "ranks": {"lora_rank": 4, "lora_rank_experts": 2, "lora_alpha_experts": 5.0},
    "also": {"lora_rank": 2, "train_also": ("embeddings", "lm_head", "norms", "router"), "router_aux_loss": 0.5},
    "shared": {"lora_rank": 3, "expert_adapters": "shared"},
    "pissa": {"lora_rank": 3, "lora_rank_experts": 2, "init_lora": "pissa"},
    "olora": {"lora_rank": 3, "init_lora": "olora", "lora_scaling": "rslora", "lora_target_modules": PARTLY},
}
TOKENS = [[1, 5, 9, 200, 31, 7, 77, 8]]


@torch.inference_mode()
def logits_of(model: MixtralModel) -> list[Any]:
    model.eval()
    logits = model.logits(torch.tensor(TOKENS, device=model.mesh.device)).double().cpu().tolist()
    model.train()
    return logits


def run(config: FinetuneConfig, mesh: Mesh, folder: Path, elsewhere: Path | None) -> dict[str, Any]:
    """Four steps, saved after the second; the last two again, resumed from what this or another layout saved."""
    base = describe_base(config.load)
    lora = LoraSettings.from_config(config)
    found: dict[str, Any] = {"losses": [], "norms": []}

    def steps(model: MixtralModel, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
        step, losses = optimizer_step(model, optimizer, config.clip_grad, EagerBackward(model)), []
        stream = batches(
            samples_of(config), seed=config.seed, micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size, data_parallel_rank=mesh.data_rank,
            data_parallel_size=mesh.data_size, consumed_samples=start * config.global_batch_size,
        )  # fmt: skip
        for _, batch in zip(range(start, stop), stream, strict=False):
            result = step(batch, 1e-2)
            losses.append(result.loss)
            found["norms"].append(result.grad_norm)
        return losses

    def start() -> tuple[MixtralModel, torch.optim.Optimizer]:
        model = load_for_training(config, base, mesh, lora, recompute=config.recomputation)
        optimizer = adapter_optimizer(model, config)
        for group in optimizer.param_groups:
            # By default AdamW makes whole steps of gradients that are nothing but rounding, in which layouts differ.
            group["eps"] = 1e-3
        return model, optimizer

    model, optimizer = start()
    found["first"] = logits_of(model)
    found["losses"] += steps(model, optimizer, 0, 2)
    found["logits"] = logits_of(model)
    description = {
        "dtype": "float32",
        "lora": lora.to_mapping(),
        "base": {"fingerprint": base.fingerprint, "path": None},
    }
    save_adapter(model, optimizer, folder, 2, description)
    found["losses"] += steps(model, optimizer, 2, 4)
    model, optimizer = start()
    saved = describe_adapter(elsewhere or folder)
    load_adapter(model, saved)
    load_optimizer(model, optimizer, saved)
    found["resumed"] = steps(model, optimizer, 2, 4)
    found["loaded"] = logits_of(load_for_inference(config, base, mesh, saved))
    return found


def main() -> None:
    checkpoint, out, layout = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    elsewhere = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    torch.distributed.init_process_group("gloo")
    results = {}
    for name, settings in FORMS.items():
        config = replace(config_of(checkpoint, out / name, layout, **settings), global_batch_size=2)
        with open_mesh(config) as mesh:
            results[name] = run(config, mesh, out / name, elsewhere / name if elsewhere is not None else None)
    if torch.distributed.get_rank() == 0:
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

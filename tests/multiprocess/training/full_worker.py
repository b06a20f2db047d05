"""Run under torchrun: full fine-tuning of one checkpoint in several layouts; figures as JSON, checkpoints next to them.

torchrun … full_worker.py CHECKPOINT OUT.json [RESUMED:]TPxEP[xCP]:DTYPE …

With CP, even with 1, the routers have no loss of their own, which needs whole rows.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.train.checkpoints.saving import SaveRequest
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch
from mixtral_run.train.full.full_step import full_step
from mixtral_run.train.full.saving import FullSaver, load_states
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.train.load_model import load_for_training
from mixtral_run.weights.manifest.describe import describe_base, describe_trained
from mixtral_run.weights.manifest.run_state import RunState

STEPS, HALF, BATCH, LENGTH, VOCABULARY = 4, 2, 12, 12, 500
CLIP, DECAY, AUX = 0.5, 0.1, 0.02
RATES = [2e-3 * (step + 1) / 2 if step < 2 else 2e-3 - 2e-4 * step for step in range(STEPS)]


def rows_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [BATCH, LENGTH + 1], and how many labels of each row count."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return tokens, torch.randint(4, LENGTH + 1, (BATCH,), generator=generator)


def batch_of(step: int, mesh: Mesh) -> GlobalBatch:
    """This rank's rows, one in each micro batch."""
    tokens, counts = rows_of(step)
    mask = (torch.arange(LENGTH)[None] < counts[:, None]).float()
    positions = torch.arange(LENGTH)[None]
    rows = range(mesh.data_rank * BATCH // mesh.data_size, (mesh.data_rank + 1) * BATCH // mesh.data_size)
    micros = [
        MicroBatch(tokens[row : row + 1, :-1], tokens[row : row + 1, 1:], mask[row : row + 1], positions)
        for row in rows
    ]
    return GlobalBatch(tuple(micros), int(counts.sum()), (step + 1) * BATCH)


def run_layout(checkpoint: Path, out: Path, layout: str, resume: Path | None, dtype: str) -> list[list[float]]:
    """Train, and save after HALF of the steps and at the end. resume: continue from this folder instead."""
    tp, ep, *context = (int(each) for each in layout.split("x"))
    config = PretrainConfig(
        load=checkpoint,
        save=out,
        mock_data=True,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        device="cpu",
        dtype=dtype,
        seq_length=LENGTH,
        context_parallel_size=next(iter(context), None),
        router_aux_loss=0.0 if context else AUX,
        offload_optimizer=ep > 1,
    ).check()
    figures = []
    with open_mesh(config) as mesh:
        base = describe_base(checkpoint if resume is None else resume)
        model = load_for_training(config, base, mesh, None, recompute="full" if tp > 1 else "none")
        optimizer = ShardedAdamW(model, DECAY, offload=config.offload_optimizer)
        optimizer.accumulate_in_fp32()
        if resume is not None:
            load_states(model, optimizer, describe_trained(resume))
        step, saver = full_step(model, optimizer, CLIP), FullSaver(model, optimizer, out)
        saver.prepare_background()
        for number in range(optimizer.num_steps, STEPS):
            result = step(batch_of(number, mesh), RATES[number])
            figures.append([result.loss, result.grad_norm])
            description = {"base": {"fingerprint": base.fingerprint}, "training": {}}
            request = SaveRequest(number + 1, description, RunState(number + 1), base.tokenizer)
            if number + 1 == HALF:
                # The next step changes the weights meanwhile.
                saver.save_in_background(request)
            elif number + 1 == STEPS:
                saver.save(request)
            elif saver.finish() is not None and mesh.is_first:
                # What a run that is stopped after it leaves.
                shutil.copytree(out, out.with_name(f"{out.name}-half"))
    return figures


def main() -> None:
    checkpoint, out, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.distributed.init_process_group("gloo")
    results = {}
    for word in words:
        *resumed, layout, dtype = word.split(":")
        resume = Path(resumed[0]) if resumed else None
        name = f"{torch.distributed.get_world_size()}-{layout}-{dtype}{'-resumed' if resumed else ''}"
        results[name] = run_layout(checkpoint, out.with_name(name), layout, resume, dtype)
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    main()

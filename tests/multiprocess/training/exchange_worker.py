"""Run under torchrun: steps with sums after the backward pass and with sums that overlap it, written as JSON.

torchrun … exchange_worker.py OUT.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh, open_mesh, seed_everything
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch
from mixtral_run.train.steps import exchange as module
from mixtral_run.train.steps.cuda_graph import backward_of
from mixtral_run.train.steps.exchange import describe_exchange
from mixtral_run.train.steps.step import Backward, EagerBackward, train_step, trainable
from tests.multiprocess.conftest import SMALL

ALL_PARTS = ("embeddings", "lm_head", "norms", "router")
ARCHITECTURE = dataclasses.replace(SMALL, num_layers=4)
ROWS = 12
STEPS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """layout: TPxEPxCP. missing: layers that give rank 1 no gradient. twice: take the steps of a run in two runs."""

    layout: str = "1x1x1"
    micro_batches: int = 1
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: tuple[int, ...] = ()
    balance: bool = False
    twice: bool = False


CASES = {
    "data": Case(),
    "data, 3 micro batches": Case(micro_batches=3, twice=True),
    "trained also": Case(micro_batches=2, lora={"train_also": ALL_PARTS}, balance=True),
    "shared, from weights": Case(lora={"shared": True, "init": "pissa"}),
    "chunks that run again": Case(model={"recompute": "full", "expert_chunks": 3}),
    "missing": Case(micro_batches=2, missing=(1, 3), twice=True),
    "missing below": Case(missing=(0,)),
    "missing everywhere": Case(missing=(0, 1, 2, 3)),
    "experts": Case("1x2x1", 2),
    "experts, shared": Case("1x2x1", lora={"shared": True}),
    "tensors": Case("2x1x1", 2, lora={"train_also": ALL_PARTS}),
    "context": Case("1x1x2", 2),
}
AFTER = [name for name, case in CASES.items() if case.layout != "1x1x1"]
"""Cases in which a run sums after the pass."""
DURING = [name for name in CASES if name not in AFTER]


def model_of(mesh: Mesh, case: Case) -> MixtralModel:
    chosen = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": LORA_TARGET_MODULES, "seed": 1} | case.lora
    model = build_model(ARCHITECTURE, ModelSettings(torch.float32, True, LoraSettings(**chosen), **case.model), mesh)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    if case.balance:
        model.balance_routers(0.1)
    if mesh.rank == 1:
        for number in case.missing:
            layer = model.gpt.decoder.layers[number]
            layer._compute = lambda hidden, *_: hidden * 1.0
    if mesh.rank == 1 and len(case.missing) == ARCHITECTURE.num_layers:
        # Without any gradient a pass fails.
        offset = torch.zeros(1, requires_grad=True)
        model.gpt.embedding.register_forward_hook(lambda _, __, output: output + offset)
    return model.train()


def batch_of(mesh: Mesh, step: int, count: int) -> GlobalBatch:
    """Return this rank's part of a batch, `count` micro batches with different numbers of loss tokens."""
    generator = torch.Generator().manual_seed(100 * step + mesh.data_rank)
    micros = []
    for number in range(count):
        tokens = torch.randint(0, ARCHITECTURE.vocab_size, (2, 17), generator=generator)
        mask = (torch.arange(16) < 3 + 4 * number + mesh.data_rank).float().repeat(2, 1)
        micros.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, torch.arange(16)[None].repeat(2, 1)))
    return GlobalBatch(tuple(micros), 64, 8)


@contextmanager
def logged(model: MixtralModel, log: list[Any]) -> Iterator[None]:
    """Log the asynchronous sums, and the end of the backward pass through the lowest layer."""
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *words: Any, group: Any = None, async_op: bool = False, **named: Any) -> Any:
        if async_op:
            log.append([dist.get_process_group_ranks(group), tensor.numel()])
        return original(tensor, *words, group=group, async_op=async_op, **named)

    lowest = model.gpt.decoder.layers[0].self_attention.linear_qkv.adapter.linear_in.weight
    hook = lowest.register_post_accumulate_grad_hook(lambda _: log.append("end"))
    with patch.object(dist, "all_reduce", all_reduce):
        yield
    hook.remove()


def steps_of(mesh: Mesh, case: Case, backward: Backward) -> dict[str, Any]:
    """Take steps. Return losses, gradients and parameters of all of them, and the log. All ranks must call."""
    parameters = trainable(backward.model)
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    found: list[Tensor] = []
    log: list[Any] = []
    losses = []
    with logged(backward.model, log):
        for step in range(STEPS):
            log.append("step")
            seed_everything(step, 0)
            result = train_step(backward.model, optimizer, batch_of(mesh, step, case.micro_batches), 1.0, backward)
            losses.append((result.loss, result.grad_norm))
            found += [each.grad.clone() for each in parameters if each.grad is not None]
            assert len(found) == (step + 1) * len(parameters)
            assert all(each.grad is not None and each.grad.is_contiguous() for each in parameters)
    found += [each.detach().clone() for each in parameters]
    return {"losses": losses, "found": found, "log": log}


def run(mesh: Mesh, case: Case) -> dict[str, Any]:
    """Return what differs on this rank between sums after the pass and those of a run, and the log of the sums that
    overlap. All ranks must call.
    """
    after = steps_of(mesh, case, EagerBackward(model_of(mesh, case)))
    ways, said, stages = [], "", 0
    for _ in range(1 + case.twice):
        model = model_of(mesh, case)
        with backward_of(model, 32) as backward:
            said = str(describe_exchange(model, backward.exchange))
            stages = len(backward.exchange.stages) if backward.exchange is not None else 0
            hooks = sum(len(each._post_accumulate_grad_hooks or ()) for each in trainable(model))
            assert hooks == (len(trainable(model)) if stages else 0)
            ways.append(steps_of(mesh, case, backward))
        assert not any(each._post_accumulate_grad_hooks for each in trainable(model))
    during = ways[0]
    pairs = list(zip(after["found"], during["found"], strict=True))
    return {
        "losses": [after["losses"], during["losses"]],
        "equal": all(torch.equal(one, other) for one, other in pairs),
        "repeats": all(torch.equal(*each) for each in zip(ways[0]["found"], ways[-1]["found"], strict=True)),
        "difference": max(float((one - other).abs().max()) for one, other in pairs)
        / max(float(each.abs().max()) for each in after["found"]),
        "log": during["log"],
        "log without": after["log"],
        "stages": stages,
        "said": said,
    }


def config_of(layout: str) -> FinetuneConfig:
    tp, ep, context = (int(number) for number in layout.split("x"))
    return FinetuneConfig(
        load=Path("base"),
        save=Path("save"),
        mock_data=True,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        context_parallel_size=context,
        seq_length=16,
        device="cpu",
    )


def main() -> None:
    dist.init_process_group("gloo")
    found = {}
    # One layer of these models is a stage.
    with patch.object(module, "LEAST_BYTES", 1):
        for layout in dict.fromkeys(case.layout for case in CASES.values()):
            with open_mesh(config_of(layout)) as mesh:
                for name in [name for name, case in CASES.items() if case.layout == layout]:
                    ranks: list[Any] = [None] * dist.get_world_size()
                    dist.all_gather_object(ranks, run(mesh, CASES[name]))
                    found[name] = ranks
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

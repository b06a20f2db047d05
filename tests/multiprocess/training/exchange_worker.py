"""Run under torchrun: steps with sums after the backward pass and with sums that overlap it, written as JSON.

torchrun … exchange_worker.py OUT.json CASE …
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.dispatch import capacity
from mixtral_run.model.dispatch.all_gather import AllGatherDispatcher
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh, open_mesh, seed_everything
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch
from mixtral_run.train.steps import exchange as module
from mixtral_run.train.steps.cuda_graph import backward_of
from mixtral_run.train.steps.exchange import GradientExchange, open_exchange
from mixtral_run.train.steps.step import Backward, EagerBackward, train_step, trainable
from tests.multiprocess.conftest import SMALL

ALL_PARTS = ("embeddings", "lm_head", "norms", "router")
ARCHITECTURE = dataclasses.replace(SMALL, num_layers=4)
ROWS = 12
STEPS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """layout: TPxEPxCP. missing: layers that give rank 1 no gradient, or none of attention where experts are spread.
    spare: of the capacity of gathered tokens. twice: take the steps with sums that overlap in two runs.
    """

    layout: str = "1x1x1"
    micro_batches: int = 1
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: tuple[int, ...] = ()
    spare: float | None = None
    balance: bool = False
    twice: bool = False


TWO = {
    "data": Case(),
    "data, 3 micro batches": Case(micro_batches=3, twice=True),
    "trained also": Case(micro_batches=2, lora={"train_also": ALL_PARTS}, balance=True),
    "shared, from weights": Case(lora={"shared": True, "init": "pissa"}),
    "chunks that run again": Case(model={"recompute": "full", "expert_chunks": 3}),
    "missing": Case(micro_batches=2, missing=(1, 3)),
    "missing below": Case(missing=(0,)),
    "missing everywhere": Case(missing=(0, 1, 2, 3)),
}
FOUR = {
    "experts": Case("1x2x1", 2, twice=True),
    "experts, missing": Case("1x2x1", 2, missing=(1, 3)),
    "experts, taken again": Case("1x2x1", 2, spare=0.3),
    "experts, shared": Case("1x2x1", lora={"shared": True}),
    "tensors": Case("2x1x1", 2, lora={"train_also": ALL_PARTS}),
    "context": Case("1x1x2", 2),
}
CASES = TWO | FOUR


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
            if mesh.expert_size > 1:
                # Other ranks need this one for their experts.
                layer.self_attention.forward = lambda hidden, *_: hidden * 1.0
            else:
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


def steps_of(mesh: Mesh, case: Case, exchange: GradientExchange | None, model: MixtralModel) -> dict[str, Any]:
    """Take steps. Return losses, gradients and parameters of all of them, and the log. All ranks must call."""
    dispatcher = None
    if case.spare is not None:
        dispatcher = AllGatherDispatcher(mesh.expert_group, ARCHITECTURE.num_experts, mesh.device)
    backward: Backward = EagerBackward(model, dispatcher, None, exchange)
    parameters = trainable(model)
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    found: list[Tensor] = []
    log: list[Any] = []
    losses = []
    with logged(model, log), ExitStack() as stack:
        if case.spare is not None:
            stack.enter_context(patch.object(capacity, "SPARE", case.spare))
        for step in range(STEPS):
            log.append("step")
            seed_everything(step, 0)
            result = train_step(model, optimizer, batch_of(mesh, step, case.micro_batches), 1.0, backward)
            losses.append((result.loss, result.grad_norm))
            found += [each.grad.clone() for each in parameters if each.grad is not None]
            assert len(found) == (step + 1) * len(parameters)
            assert all(each.grad is not None and each.grad.is_contiguous() for each in parameters)
    found += [each.detach().clone() for each in parameters]
    return {"losses": losses, "found": found, "log": log, "retaken": backward.num_retaken}


def run(mesh: Mesh, case: Case) -> dict[str, Any]:
    """Return what differs between both ways on this rank, and the log of the sums that overlap. All ranks must call."""
    after = steps_of(mesh, case, None, model_of(mesh, case))
    ways = []
    for _ in range(1 + case.twice):
        model = model_of(mesh, case)
        exchange = open_exchange(model)
        assert exchange is not None
        ways.append(steps_of(mesh, case, exchange, model))
        exchange.close()
    with backward_of(model, 32) as backward:
        # What a run gets is what was tried here.
        assert backward.exchange is not None and len(backward.exchange.stages) == len(exchange.stages)
    assert not any(each._post_accumulate_grad_hooks for each in trainable(model))
    during = ways[0]
    pairs = list(zip(after["found"], during["found"], strict=True))
    return {
        "losses": [after["losses"], during["losses"]],
        "retaken": [after["retaken"], during["retaken"]],
        "equal": all(torch.equal(one, other) for one, other in pairs),
        "repeats": all(torch.equal(*each) for each in zip(ways[0]["found"], ways[-1]["found"], strict=True)),
        "difference": max(float((one - other).abs().max()) for one, other in pairs)
        / max(float(each.abs().max()) for each in after["found"]),
        "log": during["log"],
        "log without": after["log"],
        "stages": len(exchange.stages),
        "rest": len(exchange.rest) / len(trainable(model)),
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
    cases = {name: CASES[name] for name in sys.argv[2:]}
    # One layer of these models is a stage.
    with patch.object(module, "LEAST_BYTES", 1):
        for layout in dict.fromkeys(case.layout for case in cases.values()):
            with open_mesh(config_of(layout)) as mesh:
                for name in [name for name, case in cases.items() if case.layout == layout]:
                    ranks: list[Any] = [None] * dist.get_world_size()
                    dist.all_gather_object(ranks, run(mesh, cases[name]))
                    found[name] = ranks
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

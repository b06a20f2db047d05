"""Run under torchrun: logits, losses and a resumed run of one checkpoint in several layouts, written as JSON.

torchrun … layouts_worker.py CHECKPOINT OUT.json TPxEP [TPxEP …]
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mixtral_run.config.recompute import RECOMPUTE
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import FixedShapeDecoding
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.dispatch import capacity
from mixtral_run.model.dispatch.all_gather import AllGatherDispatcher
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.parallel.mesh import Mesh, open_mesh, seed_everything
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.checkpoint import load_adapter, load_optimizer
from mixtral_run.train.data.samples import MicroBatch, MockSamples, Row, batches, stacked
from mixtral_run.train.load_model import load_for_inference, load_for_training
from mixtral_run.train.lr_schedule import learning_rate
from mixtral_run.train.steps.sgd_in_backward import SgdInBackward
from mixtral_run.train.steps.step import EagerBackward, losses_of, optimizer_step, train_step, trainable
from mixtral_run.train.validation import Validation
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from mixtral_run.weights.torch_dist import checkpoint_reader
from tests.support.adapters import save_adapter

ROWS = [[1, 5, 9, 200, 31, 7, 77, 8], [1, 300, 12], [1, 2, 3, 4, 5]]


class UnevenSamples(MockSamples):
    """Return batches whose rows have different numbers of loss tokens: a mean of the ranks' means would be wrong."""

    def num_loss_tokens(self, index: int) -> int:
        return 1 + index * 5 % self.seq_length

    def row(self, index: int) -> Row:
        row = super().row(index)
        mask = row.loss_mask.copy()
        mask[self.num_loss_tokens(index) :] = 0
        return dataclasses.replace(row, loss_mask=mask)


def samples_of(config: FinetuneConfig) -> UnevenSamples:
    return UnevenSamples(describe_base(config.load).architecture.vocab_size, config.seq_length, config.seed)


def config_of(checkpoint: Path, out: Path, layout: str, *, dtype: str = "fp32", **settings: object) -> FinetuneConfig:
    tp, ep = (int(number) for number in layout.split("x"))
    return FinetuneConfig(
        load=checkpoint,
        save=out,
        mock_data=True,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=dtype,
        seq_length=16,
        global_batch_size=8,
        train_iters=6,
        lr=1e-2,
        min_lr=1e-3,
        **settings,
    ).check()


def all_gather(mesh: Mesh, num_experts: int, *, unlimited: bool = False) -> AllGatherDispatcher | None:
    """Return an all-gather dispatcher; None where one process has all experts."""
    if mesh.expert_size == 1:
        return None
    return AllGatherDispatcher(mesh.expert_group, num_experts, mesh.device, unlimited=unlimited)


def train(
    config: FinetuneConfig,
    mesh: Mesh,
    start: int,
    stop: int,
    resume: Path | None = None,
    given: AllGatherDispatcher | None = None,
    **loading: Any,
) -> dict:
    """Losses, gradient norms and choices of the routers of iterations start…stop; the model and its optimizer.

    given: tokens are gathered where experts are spread. loading: for `load_for_training`.
    """
    base = describe_base(config.load)
    lora = LoraSettings(4, 8.0, config.lora_dropout, config.lora_target_modules, config.seed)
    model = load_for_training(config, base, mesh, lora, recompute=config.recomputation, **loading)
    optimizer = torch.optim.AdamW(trainable(model), lr=config.lr, fused=True)
    if resume is not None:
        load_adapter(model, describe_adapter(resume))
        load_optimizer(model, optimizer, describe_adapter(resume))
    before, counts, router = frozen(model), model.count_choices(), []
    stream = batches(
        samples_of(config),
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        data_parallel_rank=mesh.data_rank,
        data_parallel_size=mesh.data_size,
        consumed_samples=start * config.global_batch_size,
    )
    figures, backward = [], EagerBackward(model, given)
    for iteration, batch in zip(range(start, stop), stream, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        result = train_step(model, optimizer, batch, config.max_norm, backward)
        figures.append((result.loss, result.grad_norm))
        router.append(counts.take().tolist())
    after = frozen(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items()), "a frozen weight changed"
    return {"figures": figures, "router": router, "model": model, "optimizer": optimizer}


def pretrain(config: FinetuneConfig, mesh: Mesh, *, within: bool) -> list[tuple[float, float]]:
    """Losses and gradient norms of two iterations of SGD over all weights, within the backward pass or after it."""
    base = describe_base(config.load)
    model = load_for_training(config, base, mesh, None, recompute=config.recomputation)
    if within:
        stepper = SgdInBackward(model, 0.01)
        step = stepper.step
    else:
        step = optimizer_step(model, torch.optim.SGD(trainable(model), weight_decay=0.01), 0.0)
    stream = batches(
        samples_of(config),
        seed=config.seed,
        micro_batch_size=config.global_batch_size // mesh.data_size,
        global_batch_size=config.global_batch_size,
        data_parallel_rank=mesh.data_rank,
        data_parallel_size=mesh.data_size,
        consumed_samples=0,
    )
    results = [step(batch, 0.5) for _, batch in zip(range(2), stream, strict=False)]
    if within:
        assert all(each.grad is None for each in model.parameters()), "a gradient was kept"
        whole = sum(each.numel() * each.element_size() for each in model.parameters())
        # A layer of two, or embedding and output layer: never all.
        assert stepper.peak_gradient_bytes < 0.6 * whole
    return [(result.loss, result.grad_norm) for result in results]


@torch.inference_mode()
def apart_where_all_have_room(model: MixtralModel) -> float:
    """Return the largest difference from the logits of rows sent one by one, with the same tokens in all processes."""
    tokens = torch.tensor(ROWS[:1], device=model.mesh.device)
    expected = model.logits(tokens)
    dispatcher = all_gather(model.mesh, model.architecture.num_experts, unlimited=True)
    # What would be too little is not asked for.
    with patch.object(capacity, "SPARE", 0.5):
        return float((model.logits(tokens, dispatcher=dispatcher) - expected).abs().max())


def frozen(model: MixtralModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if not is_adapter(name)}


class FewSamples(UnevenSamples):
    """As many as no number of processes and of rows at once shares out evenly."""

    def __len__(self) -> int:
        return 7

    @property
    def num_loss_tokens_total(self) -> int:
        return sum(self.num_loss_tokens(index) for index in range(7))


def validation_losses(config: FinetuneConfig, model: MixtralModel, micro_batch_size: int) -> list[float]:
    """The loss of seven samples, and by one pass over each of them. All ranks must call."""
    samples = FewSamples(model.architecture.vocab_size, config.seq_length, 99)
    found = Validation(samples, micro_batch_size, Report.silent(), None).evaluate(model, 0, lambda: False)
    assert found is not None and model.training
    with torch.no_grad():
        total = sum(float(losses_of(model, stacked([samples.row(index)]))) for index in range(7))
    assert found.num_tokens == sum(samples.num_loss_tokens(index) for index in range(7))
    return [found.loss, total / found.num_tokens]


def packed_and_alone(model: MixtralModel, given: AllGatherDispatcher | None = None) -> tuple[float, float]:
    """The loss of three samples in one row, and of the same one by one. All ranks must call."""
    lengths, backward = (6, 8, 2), EagerBackward(model, given)
    tokens, labels = (torch.arange(16)[None] * factor % 300 for factor in (7, 11))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ones = torch.ones(1, 16)
    packed = float(backward(MicroBatch(tokens, labels, ones, positions, (lengths,)), 16))
    alone, start = 0.0, 0
    for length in lengths:
        part = (slice(None), slice(start, start + length))
        alone += float(backward(MicroBatch(tokens[part], labels[part], ones[part], positions[part]), 16))
        start += length
    return packed, alone


def run_layout(checkpoint: Path, out: Path, layout: str, saved_elsewhere: Path | None) -> dict[str, object]:
    config = config_of(checkpoint, out, layout)
    results: dict[str, Any] = {}
    num_experts = describe_base(checkpoint).architecture.num_experts
    with open_mesh(config) as mesh:
        model = load_for_inference(config, describe_base(checkpoint), mesh, None)
        results |= inference_of(model)
        run = train(config, mesh, 0, 4)
        results["figures"], results["router"] = run["figures"], {"plain": run["router"][:2]}
        if saved_elsewhere is None:
            half = train(config, mesh, 0, 2)
            description = {
                "lora": {"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules": list(config.lora_target_modules)},
                "base": {"fingerprint": describe_base(checkpoint).fingerprint},
            }
            save_adapter(half["model"], half["optimizer"], out, 2, description)
        else:
            results["resumed"] = train(config, mesh, 2, 4, resume=saved_elsewhere)["figures"]
        results["validation"] = validation_losses(config, run["model"], 1), validation_losses(config, run["model"], 3)
        results["packed"] = packed_and_alone(run["model"])
        results["full"] = pretrain(config, mesh, within=False)
        results["full_within"] = pretrain(config, mesh, within=True)
        if mesh.expert_size > 1:
            results["unlimited"] = apart_where_all_have_room(run["model"])
            dispatcher = all_gather(mesh, num_experts, unlimited=True)
            results["packed, gathered"] = packed_and_alone(run["model"], dispatcher)
        # Half of this rank's rows at once: a step still adds up micro batches, and exchanges tokens less often.
        half = max(1, config.global_batch_size // mesh.data_size // 2)
        of_layout = functools.partial(config_of, checkpoint, out, layout, micro_batch_size=half)
        add_variants(results, of_layout, mesh)
        if mesh.expert_size > 1:
            add_gathered(results, of_layout, mesh, num_experts)
    return results


def inference_of(model: MixtralModel) -> dict[str, Any]:
    """Return logits and continuations of ROWS. All ranks must call."""
    with torch.inference_mode():
        logits = [
            model.logits(torch.tensor([row], device=model.mesh.device))[0].double().cpu().tolist() for row in ROWS
        ]
    greedy = Sampling(6, 0.0, 1.0, 0)
    return {
        "logits": logits,
        "greedy": continue_rows(model, ROWS, {2}, greedy),
        "greedy_staying": continue_rows(model, ROWS, {2}, greedy, decoding=FixedShapeDecoding),
        "greedy_alone": [continue_rows(model, [row], {2}, greedy)[0] for row in ROWS],
        "drawn": continue_rows(model, ROWS, {2}, Sampling(6, 1.0, 0.9, 7)),
    }


def add_variants(results: dict[str, Any], of_layout: Callable[..., FinetuneConfig], mesh: Mesh) -> None:
    """Add runs that compute again, or in other pieces, and must have the same figures. All ranks must call."""
    for name, changed in (
        ("recomputed", of_layout(recompute_activations=True)),
        ("selective", of_layout(recompute="selective")),
        ("expert_chunks", of_layout(expert_chunks=3)),
    ):
        again = train(changed, mesh, 0, 2)
        results[name], results["router"][name] = again["figures"], again["router"]
    # Other numbers, but the same in every layout: a weight that TP splits has the scales of the whole.
    # On GPUs these products return bf16 and refuse the fp32 of these runs.
    if mesh.device.type == "cpu":
        small = train(of_layout(attention_precision="fp8"), mesh, 0, 2)
        with torch.no_grad():
            logits = small["model"].logits(torch.tensor(ROWS[:1], device=mesh.device))
        results["attention_fp8"] = {"figures": small["figures"], "logits": logits.double().tolist()}
    results["dropout"] = {}
    for mode in RECOMPUTE:
        seed_everything(1, mesh.rank)
        results["dropout"][mode] = train(of_layout(recompute=mode, lora_dropout=0.3), mesh, 0, 2)["figures"]
    for name, mode in (("recomputed", "full"), ("selective", "selective"), ("offload", "offload")):
        results[f"full_within_{name}"] = pretrain(of_layout(recompute=mode), mesh, within=True)
    results["whole_batch"] = train(of_layout(micro_batch_size=8 // mesh.data_size), mesh, 0, 2)["figures"]


def add_gathered(
    results: dict[str, Any], of_layout: Callable[..., FinetuneConfig], mesh: Mesh, num_experts: int
) -> None:
    """Add runs whose tokens are gathered by every rank of an expert group. All ranks must call."""
    results["gathered"] = {}

    def add(name: str, config: FinetuneConfig, *, unlimited: bool = False) -> None:
        dispatcher = all_gather(mesh, num_experts, unlimited=unlimited)
        again = train(config, mesh, 0, 2, given=dispatcher)
        results["gathered"][name], results["router"][f"gathered: {name}"] = again["figures"], again["router"]

    for spare in (2.0, 0.5):
        # With too little room each step is taken again, row by row.
        for mode in ("none", "selective", "full"):
            with patch.object(capacity, "SPARE", spare):
                add(f"{mode}, {spare:g}", of_layout(recompute=mode))
    add("expert_chunks", of_layout(expert_chunks=3), unlimited=True)


def main(run: Callable[[Path, Path, str, Path | None], object] = run_layout) -> None:
    """Write the results of `run` for each layout on the command line, which the first one's checkpoint follows."""
    checkpoint, out, layouts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    results: dict[str, object] = {}
    saved: Path | None = None
    # Joining once: gloo does not join a second time under the same launcher.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    # Every run loads the same base, which no run writes.
    with patch.object(checkpoint_reader, "read_metadata", functools.cache(checkpoint_reader.read_metadata)):
        for layout in layouts:
            folder = out.with_name(f"{out.stem}-{layout}")
            results[layout] = run(checkpoint, folder, layout, saved)
            saved = saved or folder
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    main()

"""What exists after a step, with Python's garbage collector off: weights, gradients, the optimizer's state, and the
buffers that are named here. Whatever else lived on would add up, or stay until the collector happens to run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.model import mixtral
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.data.samples import Answers, GlobalBatch, MicroBatch
from mixtral_run.train.full.full_step import full_step
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.train.preferences.objective import PreferenceObjective
from mixtral_run.train.steps import cuda_graph
from mixtral_run.train.steps.sgd_in_backward import SgdInBackward
from mixtral_run.train.steps.step import EagerBackward, losses_of, train_step, trainable
from mixtral_run.train.validation import evaluating
from tests.multiprocess.conftest import SMALL
from tests.support.live_tensors import LiveTensors
from tests.unit.model.test_expert_chunks import model_of

SEQ = 12


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    # The loss in chunks too, whose least number of tokens is far above those of these rows.
    with patch.object(mixtral, "MOST_LOGITS", SEQ):
        gc.disable()
        yield
        gc.enable()


def batch_of(lengths: tuple[tuple[int, ...], ...] | None = None, answers: Answers | None = None) -> GlobalBatch:
    tokens, labels = torch.randint(0, SMALL.vocab_size, (2, 2, SEQ), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQ).repeat(2, 1)
    micro = MicroBatch(tokens, labels, torch.ones(2, SEQ), positions, lengths, answers)
    return GlobalBatch((micro, micro), 4 * SEQ, 4 * SEQ)


def tensors_of(state: object) -> list[Tensor]:
    return [each for each in tree_leaves(state) if isinstance(each, Tensor)]


def left_after(
    model: MixtralModel, batch: GlobalBatch, step: Callable[[], object], named: Callable[[], Iterable[Tensor]]
) -> list[str]:
    """What made each tensor that exists after three steps, is not named, and is no view of the batch."""
    with LiveTensors() as live:
        for _ in range(2):
            step()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        inputs = tensors_of([vars(each) for each in batch.micro_batches])
        return live.besides([*model.parameters(), *model.buffers(), *gradients, *inputs, *named()])


CASES: Mapping[str, dict[str, Any]] = {
    "none, fp8": {"recompute": "none", "chunks": 1, "base_precision": "fp8"},
    "selective, packed": {"recompute": "selective", "chunks": 1, "modules": ("linear_fc2",), "packed": True},
    "full, packed, counted, balanced": {"recompute": "full", "chunks": 1, "packed": True, "watched": True},
    "full, chunks, NF4": {"recompute": "full", "chunks": 3, "base_precision": "nf4"},
    "offload, dropout": {"recompute": "offload", "chunks": 1, "dropout": 0.2},
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_named_lives_after_a_step(mesh: Mesh, case: str) -> None:
    settings = dict(CASES[case])
    packed, watched = settings.pop("packed", False), settings.pop("watched", False)
    model = model_of(mesh, **settings)
    if watched:
        model.count_choices()
        model.balance_routers(0.1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    batch = batch_of(((5, 7), (SEQ,)) if packed else None)

    def named() -> list[Tensor]:
        # Host memory that the next pass uses; the sums and the mask of the balance of the last pass.
        spare = model.gpt.decoder.layers[0].offload._spare
        assert len(spare) == (SMALL.num_layers if settings["recompute"] == "offload" else 0)
        watchers = [vars(each) for each in (model.router_counts, model.router_loss) if each is not None]
        return tensors_of([dict(optimizer.state), spare, watchers])

    assert left_after(model, batch, lambda: train_step(model, optimizer, batch, 1.0, EagerBackward(model)), named) == []


def test_only_what_is_named_lives_after_a_step_of_align(mesh: Mesh) -> None:
    model = model_of(mesh, 1)
    numbers = torch.ones(2, dtype=torch.float64)
    answers = Answers(torch.tensor([True, False]), numbers, numbers, numbers.long(), torch.ones(2, SEQ))
    config = AlignConfig(load=Path("base"), save=Path("save"), data_path=("x",), method="orpo", seq_length=SEQ)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    backward, batch = EagerBackward(model, objective=PreferenceObjective(config)), batch_of(answers=answers)

    def step() -> None:
        train_step(model, optimizer, batch, 1.0, backward)

    assert left_after(model, batch, step, lambda: tensors_of(dict(optimizer.state))) == []


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_only_what_is_named_lives_after_a_step_over_all_weights(mesh: Mesh, optimizer: str) -> None:
    model = build_model(SMALL, ModelSettings(torch.float32, True, recompute="full"), mesh).train()
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(0.0, 0.1)
    batch = batch_of()
    if optimizer == "SGD":
        one = GlobalBatch(batch.micro_batches[:1], 2 * SEQ, 2 * SEQ)
        step = SgdInBackward(model, 0.01)
        # The norms of the pieces of the last step, each a number.
        assert left_after(model, one, lambda: step.step(one, 1e-3), lambda: tensors_of(step._squares)) == []
        return
    state = ShardedAdamW(model, 0.01, offload=False)
    full = full_step(model, state, 1.0, None)
    assert (
        left_after(model, batch, lambda: full(batch, 1e-3), lambda: tensors_of([vars(each) for each in state.slices]))
        == []
    )


def test_nothing_lives_after_validation_and_generation(mesh: Mesh) -> None:
    model, batch = model_of(mesh, 1), batch_of()

    def evaluate() -> None:
        with evaluating(model):
            losses_of(model, batch.micro_batches[0])
            continue_rows(model, [[1, 5, 9], [1, 2]], (), Sampling(3, 0.0, 1.0, 0))

    assert left_after(model, batch, evaluate, list) == []


def test_eager_passes_let_the_allocators_segments_grow(mesh: Mesh) -> None:
    """Only a GPU's grow (tests/unit/model/test_allocator.py)."""
    grown: list[str] = []

    @contextmanager
    def note(device: torch.device) -> Iterator[None]:
        grown.append(device.type)
        yield
        grown.append("end")

    with patch.object(cuda_graph, "growing_segments", note):
        with cuda_graph.backward_of(model_of(mesh, 1), SEQ) as backward:
            assert isinstance(backward, EagerBackward) and grown == ["cpu"]
        assert grown == ["cpu", "end"]


def test_a_tensor_that_only_a_cycle_or_a_graph_holds_is_found() -> None:
    def keep() -> dict[str, Any]:
        cycle: dict[str, Any] = {"tensor": torch.ones(3) * 2}
        cycle["itself"] = cycle
        return {"loss": (torch.ones(5, requires_grad=True).exp() * 1).sum()}

    with LiveTensors() as live:
        kept = keep()
        found = live.besides(kept.values())
    assert [each.split()[0] for each in found] == ["aten.exp.default", "aten.mul.Tensor", "aten.ones.default"]

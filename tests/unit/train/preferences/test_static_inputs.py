"""Steps of `align` whose passes read static inputs, as a CUDA graph does, against eager steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.model.attention.packed_attention import PackedSizes
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.data.samples import MicroBatch, batches
from mixtral_run.train.preferences.objective import PreferenceObjective
from mixtral_run.train.steps import cuda_graph
from mixtral_run.train.steps.captured_losses import CapturedLosses
from mixtral_run.train.steps.cuda_graph import CapturedBackward
from mixtral_run.train.steps.step import Backward, EagerBackward, StepResult, train_step, trainable
from tests.multiprocess.conftest import SMALL
from tests.unit.model.recompute.test_recompute import model_of
from tests.unit.train.test_preferences import Answer, arrays_of

SEQ = 40
STEPS = 4


class ReplayedBackward(CapturedBackward):
    """STAND-IN for the GPU: a graph that computes from the static inputs again whenever it is replayed."""

    def _capture(self, adds: bool) -> None:
        parts = torch.full((9,), torch.nan, dtype=torch.float64)

        def replay() -> None:
            parts.copy_(self._pass(adds))
            if not adds:
                self._gradients = [parameter.grad for parameter in self._parameters]

        graph: Any = SimpleNamespace(replay=replay, pool=lambda: "the pool of training")
        self._gradients = self._gradients or [None]
        self._graphs[adds] = graph, parts


class ReplayedLosses(CapturedLosses):
    """STAND-IN for the GPU: the same of a pass without gradients."""

    made: list[ReplayedLosses]

    def __init__(self, model: MixtralModel, micro: MicroBatch, pool: Any) -> None:
        assert pool == "the pool of training" and not model.training and not torch.is_grad_enabled()
        self._model = model
        self._inputs = [micro.tokens.clone(), micro.labels.clone()]
        self._losses = torch.full(micro.tokens.shape, torch.nan)
        self.num_refreshed = 0

        def replay() -> None:
            assert self.num_refreshed > 0, "a graph reads copies of the adapters that must have been updated"
            self._losses.copy_(model.losses(*self._inputs))

        def refresh() -> None:
            self.num_refreshed += 1

        graph: Any = SimpleNamespace(replay=replay)
        self._graph = graph
        refreshing: Any = model
        refreshing.refresh_adapters = refresh
        self.made.append(self)

    def __call__(self, micro: MicroBatch) -> Tensor:
        self.num_refreshed = 0
        return super().__call__(micro)


def samples_of(config: AlignConfig, folder: Path) -> PreferenceSamples:
    """Return answers of other lengths each, so that packed rows have other numbers of them."""
    draw = np.random.default_rng(11)

    def tokens(low: int, high: int) -> list[int]:
        return draw.integers(3, SMALL.vocab_size, draw.integers(low, high)).tolist()

    prompts = [[1, *tokens(1, 5)] for _ in range(9)]
    # A fifth of the rows has two long answers, the others have many short ones.
    longest = [16 if number % 5 == 0 else 4 for number in range(9)]
    answers: list[Answer | None] = [
        (prompt, tokens(1, most)) for prompt, most in zip(prompts, longest, strict=True) for _ in range(2)
    ]
    paired = config.method != "kto"
    samples = PreferenceSamples(arrays_of(answers), SEQ, 2, "x", None, paired=paired, packs=config.pack, folder=folder)
    if config.has_reference:
        samples.reference = draw.normal(-20.0, 2.0, len(answers))
        samples.mismatched_reference = draw.normal(-20.0, 2.0, len(answers)) - 20 if not paired else None
    return samples


def steps_of(
    backward: Backward, samples: PreferenceSamples, config: AlignConfig
) -> tuple[list[StepResult], list[Tensor]]:
    """Return the results of some steps of two micro batches, and the gradients of the last one."""
    parameters = trainable(backward.model)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    stream = batches(samples, seed=3, micro_batch_size=config.micro_batch_size, global_batch_size=4)
    results = [train_step(backward.model, optimizer, next(stream), 0.0, backward) for _ in range(STEPS)]
    return results, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("dpo", {}), ("dpo", {"loss_type": "ipo"}), ("kto", {"beta": 0.4}), ("orpo", {}), ("simpo", {})],
)
def test_a_step_from_static_inputs_is_the_eager_step(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any], pack: bool
) -> None:
    ReplayedLosses.made = []
    monkeypatch.setattr(cuda_graph, "CapturedLosses", ReplayedLosses)
    config = AlignConfig(
        load=Path("base"), save=Path("save"), data_path=("x",), method=method, pack=pack, seq_length=SEQ,
        micro_batch_size=2, global_batch_size=4, **settings,
    ).check()  # fmt: skip
    samples = samples_of(config, tmp_path)
    assert (samples.most is not None) == pack
    eager, gradients = steps_of(
        EagerBackward(model_of(mesh, "none"), objective=PreferenceObjective(config)), samples, config
    )
    replayed = ReplayedBackward(model_of(mesh, "none"), None, samples.most, PreferenceObjective(config))
    found, found_gradients = steps_of(replayed, samples, config)
    assert set(replayed._graphs) == {False, True}
    assert len({step.loss for step in eager}) == STEPS
    if method == "kto":
        assert all(step.figures["kl"] > 0 for step in eager)
    # The first step's pass over other answers is eager; packed ones are always.
    assert len(ReplayedLosses.made) == (method == "kto" and not pack)
    if not pack:
        assert found == eager
        assert all(map(torch.equal, found_gradients, gradients)) and len(gradients) > 0
        return
    numbers = {len(samples.entries_of(index)) for index in range(len(samples))}
    assert len(numbers) > 1, "rows must have other numbers of answers"
    for one, other in zip(found, eager, strict=True):
        assert (one.loss, one.grad_norm) == pytest.approx((other.loss, other.grad_norm), rel=1e-6)
        assert one.figures == pytest.approx(other.figures, rel=1e-6, abs=1e-9)
    for mine, expected in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_inputs_of_packed_rows_have_the_same_shapes(tmp_path: Path, method: str) -> None:
    config = AlignConfig(load=Path("base"), save=Path("save"), data_path=("x",), method=method, pack=True)
    samples = samples_of(config, tmp_path)
    assert samples.most is not None
    objective = PreferenceObjective(config)
    rows = range(len(samples))
    found = [objective.inputs(samples.micro_batch([index]), 3, samples.most) for index in rows]
    assert len({tuple(each.shape for each in inputs) for inputs in found}) == 1
    assert len({tuple(each.shape for each in objective.inputs(samples.micro_batch([index]), 3)) for index in rows}) > 1
    for index, (_, _, each, _, _, lengths, which) in zip(rows, found, strict=True):
        count = len(samples.entries_of(index))
        assert each[0].tolist() == [1.0] * count + [0.0] * (len(each[0]) - count)
        assert each[2].min() >= 1 and each[1, count:].abs().sum() == 0
        assert lengths.sum() == SEQ and len(set(which.tolist())) == len(which)
        assert lengths[which[count:]].tolist() == [0] * (len(which) - count)


def test_the_largest_sizes_of_packed_rows(tmp_path: Path) -> None:
    """Pairs of 21 + 16 and of 3 + 4 positions in rows of 40: alone with 3 of padding, and with each other."""
    long: tuple[Answer, Answer] = (([1], [5] * 21), ([1], [6] * 16))
    short: tuple[Answer, Answer] = (([1], [5] * 3), ([1], [6] * 4))

    def most_of(*pairs: tuple[Answer, Answer], packs: bool = True) -> PackedSizes | None:
        answers: list[Answer | None] = [answer for pair in pairs for answer in pair]
        return PreferenceSamples(arrays_of(answers), 40, 2, "x", None, paired=True, packs=packs, folder=tmp_path).most

    assert most_of(long, packs=False) is None
    assert most_of(long) == PackedSizes(samples=3, longest=21)
    assert most_of(short) == PackedSizes(samples=3, longest=33)  # the padding
    assert most_of(short, short, long) == PackedSizes(samples=5, longest=26)

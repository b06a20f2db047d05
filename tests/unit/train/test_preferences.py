"""Losses, gradients and figures of `align` compared with TRL's formulas, written out over logits of whole answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model, is_adapter
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache.token_arrays import TokenArrays
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.data.samples import batches
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.preferences.objective import PreferenceObjective
from mixtral_run.train.preferences.prepare import _with_adapter
from mixtral_run.train.preferences.reference import ReferenceFile, add_references
from mixtral_run.train.steps.step import EagerBackward, train_step, trainable
from mixtral_run.train.validation import Validation, rows_of_all_ranks
from tests.multiprocess.conftest import SMALL
from tests.unit.model.recompute.test_recompute import model_of

SEQ = 40
Answer = tuple[list[int], list[int]]
"""Tokens of a prompt and of an answer."""


@pytest.fixture
def model(mesh: Mesh) -> MixtralModel:
    return model_of(mesh, "none")


@pytest.fixture
def base(mesh: Mesh, model: MixtralModel) -> MixtralModel:
    """The same base weights in a model that never had adapters: what the reference must compute."""
    alone = build_model(SMALL, ModelSettings(torch.float32, True), mesh).eval()
    alone.load_state_dict({name: value for name, value in model.state_dict().items() if not is_adapter(name)})
    return alone


def pairs_of(count: int) -> list[tuple[Answer, Answer]]:
    """Random pairs, different in each run of the tests."""
    draw = np.random.default_rng()

    def tokens(low: int, high: int) -> list[int]:
        return draw.integers(3, SMALL.vocab_size, draw.integers(low, high)).tolist()

    prompts = [[1, *tokens(1, 7)] for _ in range(count)]
    return [((prompt, tokens(1, 9)), (prompt, tokens(1, 9))) for prompt in prompts]


def arrays_of(answers: list[Answer | None]) -> TokenArrays:
    encoded = [
        EncodedExample(np.asarray(each[0] + each[1], np.int32), ((len(each[0]), len(each[0]) + len(each[1])),))
        if each is not None
        else EncodedExample(np.empty(0, np.int32), ())
        for each in answers
    ]
    return TokenArrays.of([f"line {number // 2 + 1}" for number in range(len(answers))], encoded)


def samples_of(answers: list[Answer | None], folder: Path, config: AlignConfig) -> PreferenceSamples:
    paired = config.method != "kto"
    return PreferenceSamples(
        arrays_of(answers), config.seq_length, 2, "--data-path x", None, paired=paired, packs=config.pack, folder=folder
    )


def config_of(method: str, **settings: Any) -> AlignConfig:
    batch = {"micro_batch_size": 2, "global_batch_size": 6, "seq_length": SEQ} | settings
    return AlignConfig(load=Path("base"), save=Path("save"), data_path=("x",), method=method, **batch).check()


def log_probability(model: MixtralModel, answer: Answer) -> Tensor:
    """The sum over an answer's tokens, from the logits of the prompt and the answer alone."""
    prompt, tokens = answer
    logits = model.logits(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    return log_softmax(logits.double(), -1)[range(len(tokens)), tokens].sum()


def nll(model: MixtralModel, answer: Answer) -> tuple[Tensor, int]:
    """The cross entropy over prompt and answer, as ORPO's trainer takes it, and the number of its tokens."""
    tokens = torch.tensor(answer[0] + answer[1])
    logits = model.logits(tokens[None])[0, :-1]
    return -log_softmax(logits.double(), -1)[range(len(tokens) - 1), tokens[1:]].sum(), len(tokens) - 1


def taken(
    model: MixtralModel, samples: PreferenceSamples, config: AlignConfig
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Loss, figures and gradients of one step over a global batch."""
    if config.has_reference:
        passes = rows_of_all_ranks(len(samples), config.micro_batch_size, 1)
        add_references(config, "base", partial(without_adapters, model), model, samples, passes, Report.silent())
    batch = next(
        batches(samples, seed=0, micro_batch_size=config.micro_batch_size, global_batch_size=config.global_batch_size)
    )
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    backward = EagerBackward(model, objective=PreferenceObjective(config))
    result = train_step(model, optimizer, batch, 0.0, backward)
    return result.loss, dict(result.figures), gradients(model)


def gradients(model: MixtralModel) -> dict[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def compare(
    model: MixtralModel,
    found: tuple[float, dict[str, float], dict[str, Tensor]],
    loss: Tensor,
    figures: dict[str, Tensor],
) -> None:
    for parameter in trainable(model):
        parameter.grad = None
    loss.backward()
    assert found[0] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert {name: found[1][name] for name in figures} == pytest.approx(
        {name: each.item() for name, each in figures.items()}, rel=1e-4, abs=1e-4
    )
    expected = gradients(model)
    assert expected.keys() == found[2].keys() and any(each.abs().max() > 1e-4 for each in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[2][name], gradient, rtol=2e-3, atol=1e-5 * float(gradient.abs().max() + 1))


def dpo(settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    beta, smoothing = settings.get("beta", 0.1), settings.get("label_smoothing", 0.0)
    if settings.get("loss_type") == "ipo":
        return lambda delta: (delta - 1 / (2 * beta)) ** 2
    if settings.get("loss_type") == "hinge":
        return lambda delta: torch.clamp(1 - beta * delta, min=0)
    return lambda delta: -logsigmoid(beta * delta) * (1 - smoothing) - logsigmoid(-beta * delta) * smoothing


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"loss_type": "ipo"}, {"loss_type": "hinge", "beta": 0.05}]
)
def test_dpo_is_that_of_trl(
    model: MixtralModel, base: MixtralModel, tmp_path: Path, settings: dict[str, Any], pack: bool
) -> None:
    pairs = pairs_of(6)
    batch = {"micro_batch_size": 1, "global_batch_size": 2, "seq_length": 96} if pack else {}
    config = config_of("dpo", pack=pack, **batch, **settings)
    samples = samples_of([each for pair in pairs for each in pair], tmp_path, config)
    if pack:
        assert len(samples) in (1, 2) and sum(map(samples.num_loss_tokens, range(len(samples)))) == 6
        config = dataclasses.replace(config, global_batch_size=len(samples))
    found = taken(model, samples, config)
    ratios = []
    for pair in pairs:
        per_token = [len(answer[1]) if config.loss_type == "ipo" else 1 for answer in pair]
        ratios.append(
            [
                (log_probability(model, answer) - log_probability(base, answer).detach()) / number
                for answer, number in zip(pair, per_token, strict=True)
            ]
        )
    chosen, rejected = (torch.stack([each[side] for each in ratios]) for side in (0, 1))
    beta = config.reward_factor
    figures = {
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margins": beta * (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
    }
    compare(model, found, dpo(settings)(chosen - rejected).mean(), figures)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_methods_without_a_reference_are_those_of_trl(
    model: MixtralModel, tmp_path: Path, method: str, pack: bool
) -> None:
    pairs = pairs_of(6)
    settings = {"beta": 0.3} if method == "orpo" else {"beta": 1.5, "simpo_gamma": 0.4, "label_smoothing": 0.1}
    batch = {"micro_batch_size": 1, "global_batch_size": 2, "seq_length": 96} if pack else {}
    config = config_of(method, pack=pack, **batch, **settings)
    samples = samples_of([each for pair in pairs for each in pair], tmp_path, config)
    if pack:
        config = dataclasses.replace(config, global_batch_size=len(samples))
    found = taken(model, samples, config)
    means = [[log_probability(model, answer) / len(answer[1]) for answer in pair] for pair in pairs]
    chosen, rejected = (torch.stack([each[side] for each in means]) for side in (0, 1))
    figures = {
        "rewards/chosen": config.reward_factor * chosen.mean(),
        "rewards/rejected": config.reward_factor * rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
    }
    if method == "orpo":
        odds = chosen - rejected - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
        entropies = [nll(model, pair[0]) for pair in pairs]
        of_text = sum(each for each, _ in entropies) / sum(number for _, number in entropies)
        figures["nll_loss"] = of_text
        loss = of_text - (0.3 * logsigmoid(odds)).mean()
    else:
        logits = 1.5 * (chosen - rejected - 0.4 / 1.5)
        loss = (-logsigmoid(logits) * 0.9 - logsigmoid(-logits) * 0.1).mean()
    compare(model, found, loss, figures)


@pytest.mark.parametrize(("paired", "pack"), [(False, False), (True, False), (False, True), (True, True)])
def test_kto_is_that_of_trl(model: MixtralModel, base: MixtralModel, tmp_path: Path, paired: bool, pack: bool) -> None:
    """Its divergence is estimated with the answer before each, of the chosen ones and then of the rejected ones."""
    kl = torch.zeros(())
    while kl == 0:  # A negative estimate counts as 0, which would not test it.
        answers: list[Answer | None] = [each for pair in pairs_of(3) for each in pair]
        if not paired:
            singles = [one for one, _ in pairs_of(6)]
            answers = [
                each for number, one in enumerate(singles) for each in ((one, None) if number % 3 else (None, one))
            ]
        labeled = [(each, side == 0) for side in (0, 1) for each in answers[side::2] if each is not None]
        mismatched = [(labeled[number][0][0], labeled[number - 1][0][1]) for number in range(6)]
        with torch.no_grad():
            divergences = [log_probability(model, each) - log_probability(base, each) for each in mismatched]
            kl = torch.stack(divergences).mean().clamp(min=0)
    batch = {"micro_batch_size": 2, "global_batch_size": 2, "seq_length": 64} if pack else {}
    config = config_of("kto", beta=0.4, desirable_weight=1.5, undesirable_weight=0.5, pack=pack, **batch)
    samples = samples_of(answers, tmp_path, config)
    if pack:
        assert len(samples) <= 2 and sum(map(samples.num_loss_tokens, range(len(samples)))) == 6
        config = dataclasses.replace(config, global_batch_size=len(samples), micro_batch_size=len(samples))
    found = taken(model, samples, config)
    losses, rewards = [], {True: [], False: []}
    for answer, label in labeled:
        ratio = log_probability(model, answer) - log_probability(base, answer).detach()
        rewards[label].append(0.4 * ratio)
        losses.append(
            1.5 * (1 - torch.sigmoid(0.4 * (ratio - kl))) if label else 0.5 * (1 - torch.sigmoid(0.4 * (kl - ratio)))
        )
    figures = {
        "rewards/chosen": torch.stack(rewards[True]).mean(),
        "rewards/rejected": torch.stack(rewards[False]).mean(),
        "kl": kl,
    }
    compare(model, found, torch.stack(losses).mean(), figures)


def test_a_divergence_that_is_not_a_number_is_not_taken_for_none(model: MixtralModel, tmp_path: Path) -> None:
    config = config_of("kto", global_batch_size=2)
    with torch.no_grad():
        next(each for name, each in model.named_parameters() if ".linear_out" in name).fill_(math.nan)
    _, figures, _ = taken(model, samples_of([each for pair in pairs_of(1) for each in pair], tmp_path, config), config)
    assert math.isnan(figures["kl"])


@pytest.mark.parametrize(
    ("method", "pack"), [("dpo", False), ("kto", False), ("kto", True), ("orpo", False), ("orpo", True)]
)
def test_the_validation_loss_is_that_of_one_batch(model: MixtralModel, tmp_path: Path, method: str, pack: bool) -> None:
    """A set that its passes do not divide evenly: what fills the last pass does not count."""
    config = config_of(method, micro_batch_size=4, pack=pack)
    samples = samples_of([each for pair in pairs_of(3) for each in pair], tmp_path, config)
    whole = dataclasses.replace(config, micro_batch_size=len(samples), global_batch_size=len(samples))
    loss, figures, _ = taken(model, samples, whole)
    validation = Validation(samples, 4, Report.silent(), tmp_path / "lines", PreferenceObjective(config), "x loss")
    found = validation.evaluate(model, 0, lambda: False)
    assert found is not None and found.loss == pytest.approx(loss, rel=1e-6)
    assert found.figures == pytest.approx(figures, rel=1e-5, abs=1e-6)
    assert "x loss" in found.line(10) and "perplexity" not in found.line(10)


def test_stored_references_are_used_and_damaged_ones_are_not(
    model: MixtralModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("dpo")
    answers = [each for pair in pairs_of(6) for each in pair]
    samples = samples_of(answers, tmp_path, config)
    add_references(config, "base", partial(without_adapters, model), model, samples, [((1, 4),)], Report.silent())
    assert samples.reference is not None
    known = [number for number in range(12) if not math.isnan(samples.reference[number])]
    assert known == [2, 3, 8, 9]
    (file,) = tmp_path.iterdir()
    written = bytearray(file.read_bytes())
    # Other values with a right checksum are believed: nothing is computed again.
    again = samples_of(answers, tmp_path, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    add_references(config, "base", partial(without_adapters, model), model, again, [((1, 4),)], Report.silent())
    np.testing.assert_array_equal(again.reference, samples.reference)
    why = "--base-precision fp8 (was bf16)"
    add_references(config, "another", partial(without_adapters, model), model, again, [((1, 4),)], Report(), why)
    assert f"2 samples (0 are known), because the reference is another one: {why}\n" in capsys.readouterr().out
    assert again.reference[2] != samples.reference[2] and len(list(tmp_path.iterdir())) == 2
    written[-20] ^= 1
    file.write_bytes(written)
    add_references(config, "base", partial(without_adapters, model), model, again, [((1, 4),)], Report.silent())
    assert again.reference[2] != samples.reference[2]


def test_what_fills_a_pass_has_no_loss_and_needs_no_reference(tmp_path: Path) -> None:
    samples = samples_of([each for pair in pairs_of(2) for each in pair], tmp_path, config_of("dpo"))
    samples.reference = np.asarray([math.nan, math.nan, -1.0, -2.0])
    micro = samples.micro_batch([1, None])
    assert micro.answers is not None
    assert micro.answers.reference.tolist() == [-1.0, -2.0, 0.0, 0.0]
    assert micro.answers.counts.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert [bool(row.any()) for row in micro.loss_mask] == [True, True, False, False]
    assert [bool(row.any()) for row in micro.answers.text_mask] == [True, False, False, False]


def test_a_reference_file_keeps_what_another_run_has_added(tmp_path: Path) -> None:
    file = ReferenceFile(tmp_path / "reference-x.bin", 3)
    nan = math.nan
    assert np.isnan(file.read()).all()
    file.write(np.asarray([-1.0, nan, nan]))
    file.write(np.asarray([nan, -2.0, nan]))
    assert file.read()[:2].tolist() == [-1.0, -2.0] and np.isnan(file.read()[2])
    assert [each.name for each in tmp_path.iterdir()] == ["reference-x.bin"]


def test_the_reference_may_have_the_adapter_of_the_start(model: MixtralModel, tmp_path: Path) -> None:
    """A resumed run: the model has another adapter than at the start, and keeps it."""
    config = config_of("dpo")
    answers = [each for pair in pairs_of(6) for each in pair]
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if is_adapter(name)}
    with torch.no_grad():
        expected = [log_probability(model, answer).item() for answer in answers]
        for parameter in trainable(model):
            parameter.mul_(3.0)
    trained = gradient_free_copy(model)

    @contextmanager
    def as_start() -> Iterator[None]:
        def load(*_: object) -> None:
            model.load_state_dict(start, strict=False)

        adapter: Any = None
        with patch("mixtral_run.train.preferences.prepare.load_adapter", load), _with_adapter(model, adapter):
            yield

    samples = samples_of(answers, tmp_path, config)
    add_references(config, "base with adapter", as_start, model, samples, rows_of_all_ranks(6, 2, 1), Report.silent())
    assert samples.reference is not None and samples.reference.tolist() == pytest.approx(expected, abs=1e-3)
    for name, value in gradient_free_copy(model).items():
        assert torch.equal(value, trained[name])


def gradient_free_copy(model: MixtralModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_packed_mismatched_answers_are_in_one_row_that_tp_can_split(tmp_path: Path) -> None:
    """Two answers, each with the other's prompt: 1 + 2 and 3 + 4 tokens become 1 + 4 and 3 + 2."""
    answers: list[Answer | None] = [([5], [6, 7]), None, None, ([8, 9, 10], [11, 12, 13, 14])]
    config = config_of("kto", pack=True, seq_length=16)
    samples = PreferenceSamples(
        arrays_of(answers), 16, 2, "x", None, paired=False, packs=True, folder=tmp_path, row_multiple=3
    )
    assert config.pack and len(samples) == 1 and samples.remarks() == []
    micro = samples.mismatched(np.array([0, 3]), torch.ones(2).double())
    assert micro.tokens.tolist() == [[5, 11, 12, 13, 8, 9, 10, 6, 2]]
    assert micro.labels.tolist() == [[11, 12, 13, 14, 9, 10, 6, 7, 2]]
    assert micro.loss_mask.tolist() == [[1, 1, 1, 1, 0, 0, 1, 1, 0]]
    assert micro.lengths == ((4, 4, 1),) and micro.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0]]
    assert micro.answers is not None and micro.answers.num_tokens.tolist() == [4, 2]
    alone = samples_of([([5], [6, 7]), None], tmp_path, config)
    assert [each.split(":")[0] for each in alone.remarks()] == ["No answer is undesirable", "There is one answer only"]


def test_answers_that_are_too_long_are_refused_together(tmp_path: Path) -> None:
    long: Answer = ([1, 5, 6], [7] * (SEQ - 1))
    short: Answer = ([1, 5], [8])
    answers: list[Answer | None] = [short, short, long, short, short, long, short, short]
    with pytest.raises(ConfigError) as caught:
        samples_of(answers, tmp_path, config_of("dpo"))
    assert caught.value.problems == (
        "line 2: 42 tokens with the chosen answer and 3 tokens with the rejected answer",
        "line 3: 3 tokens with the chosen answer and 42 tokens with the rejected answer",
    )
    assert "2 of 4 examples" in caught.value.what and "--seq-length 41" in str(caught.value.next_command)
    one_less: Answer = ([1, 5, 6], [7] * (SEQ - 2))
    assert len(samples_of([one_less, short], tmp_path, config_of("dpo"))) == 1
    with pytest.raises(ConfigError, match="because of --pack"):
        samples_of([one_less, short], tmp_path, config_of("dpo", pack=True))

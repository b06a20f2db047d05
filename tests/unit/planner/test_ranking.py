"""Order and speed of layouts: products of factors that are written out, and each boundary of what is tried."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.planner import ranking, spread
from mixtral_run.planner.ranking import Choice, faster_micro_batch, ranked, rate_by_tokens, relative_speed
from mixtral_run.planner.workload import Layout, Memory, Workload


@pytest.mark.parametrize(
    ("layout", "fixed", "speed"),
    [
        (Layout(1, 1, "none"), True, 1.0),
        (Layout(1, 2, "none"), True, 0.97),
        (Layout(1, 2, "none"), False, 0.88),
        (Layout(1, 4, "none"), True, 0.92),
        (Layout(1, 8, "none"), False, 0.78),
        (Layout(2, 1, "none"), True, 0.8),
        (Layout(4, 1, "none"), True, 0.64),
        (Layout(1, 1, "selective"), True, 0.95),
        (Layout(1, 1, "full"), True, 0.73),
        (Layout(1, 1, "offload"), True, 0.71),
        (Layout(1, 1, "none", 2), True, 0.97),
        (Layout(1, 1, "none", 4), True, 0.97 * 0.97),
        (Layout(1, 1, "full", 1, 3), True, 0.73 * 0.98),
        (Layout(2, 4, "full", 2, 2), False, 0.8 * 0.78 * 0.73 * 0.97 * 0.98),
        # At 512 tokens attention takes 512 / 40,000 of the time of all else; a quarter of it is not computed again.
        (Layout(1, 1, "except-attention"), True, 0.73 * (1.36 + 1.25 * 0.0128) / (1.36 + 0.0128)),
        (Layout(1, 1, "full", recompute_layers=32), True, 0.73),
        (Layout(1, 1, "full", recompute_layers=99), True, 0.73),
        (Layout(1, 1, "full", recompute_layers=8), True, 32 / (8 / 0.73 + 24 / 0.95)),
        (Layout(2, 1, "offload", recompute_layers=16), True, 0.8 * 2 / (1 / 0.71 + 1 / 0.95)),
    ],
)
def test_the_factors_of_a_speed(monkeypatch: pytest.MonkeyPatch, layout: Layout, fixed: bool, speed: float) -> None:
    dispatch = SimpleNamespace(dispatch=SimpleNamespace(has_fixed_shapes=fixed))
    monkeypatch.setattr(ranking, "execution", lambda *_: dispatch)
    assert relative_speed(Workload(), layout) == pytest.approx(speed, abs=1e-12)


def test_rates_at_and_between_the_points() -> None:
    """Halfway between two points on a scale of logarithms is half of the difference."""
    points = {1: 0.70, 512: 0.70, 1024: 0.85, 2048: 1.0, 4096: 1.07, 8192: 1.14, 100_000: 1.14}
    assert {tokens: pytest.approx(rate) for tokens, rate in points.items()} == {
        tokens: rate_by_tokens(tokens) for tokens in points
    }


def test_divisors() -> None:
    assert [ranking._divisors(number) for number in (1, 2, 6, 8, 7)] == [
        [1], [1, 2], [1, 2, 3, 6], [1, 2, 4, 8], [1, 7],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "recompute", "tokens", "tp", "chunks"),
    [
        (None, "none", 100_000, 1, [1]),
        (None, "selective", 100_000, 1, [1]),
        (None, "full", 8192, 1, [1]),
        (None, "full", 8193, 1, [1, 2]),
        (None, "offload", 16_385, 1, [1, 3]),
        (None, "full", 16_384, 2, [1]),
        (None, "full", 16_386, 2, [1, 2]),
        (1, "none", 100_000, 1, [1]),
        (3, "full", 100, 1, [3]),
        (3, "none", 100, 1, []),
    ],
)
def test_chunks_of_experts(given: int | None, recompute: str, tokens: int, tp: int, chunks: list[int]) -> None:
    """Of up to 8,192 tokens each, where the layer is computed a second time."""
    workload = Workload(seq_length=tokens, expert_chunks=given)
    assert ranking._chunks(workload, Layout(tp, 1, recompute)) == chunks


def test_all_layouts_of_two_gpus() -> None:
    found = {
        (each.tensor_model_parallel_size, each.expert_model_parallel_size) for each in ranking.layouts(Workload(gpus=2))
    }
    assert found == {(1, 1), (1, 2), (2, 1), (2, 2)}
    # An odd row cannot be split by TP, and with CP two ranks of a row and TP 2 need four GPUs.
    odd = {each.tensor_model_parallel_size for each in ranking.layouts(Workload(gpus=2, seq_length=511))}
    assert odd == {1}
    context = {
        (each.tensor_model_parallel_size, each.context_parallel_size) for each in ranking.layouts(Workload(gpus=2), 2)
    }
    assert context == {(1, 2)}
    assert list(ranking.layouts(Workload(gpus=2), 4)) == []
    eight = {each.expert_model_parallel_size for each in ranking.layouts(Workload(gpus=6))}
    assert eight == {1, 2}  # 8 experts cannot be split over 3 or 6


def played(monkeypatch: pytest.MonkeyPatch, sizes: Callable[[Layout], tuple[float, float, float]]) -> None:
    """Let a layout take these bytes of a GPU and of a host, and have this speed."""

    def needed(_: object, layout: Layout) -> Memory:
        return Memory(sizes(layout)[0], 0, 0, 0, 0, 0, 0)

    monkeypatch.setattr(ranking, "fit_dispatch", lambda workload, *_: workload)
    monkeypatch.setattr(ranking, "memory", needed)
    monkeypatch.setattr(ranking, "host_bytes", lambda _, layout: sizes(layout)[1])
    monkeypatch.setattr(ranking, "relative_speed", lambda _, layout: sizes(layout)[2])


def test_what_fits_comes_first_then_what_is_fast_then_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "none": (98.0, 0.0, 1.0),
        "selective": (97.0, 0.0, 0.5),
        "except-attention": (99.0, 0.0, 0.6),
        "full": (20.0, 0.0, 0.5),
        "offload": (10.0, 80.0, 0.9),
    }
    played(monkeypatch, lambda layout: table[layout.recompute])
    workload = Workload(gpus=1)
    order = [(each.layout.recompute, each.fits) for each in ranked(workload, 100.0, 100.0)]
    # 97 % of a GPU and 80 % of the RAM may be used; offloading is the last resort.
    not_fitting = [("none", False), ("except-attention", False)]
    assert order == [("full", True), ("selective", True), ("offload", True), *not_fitting]
    order = [(each.layout.recompute, each.fits) for each in ranked(workload, 100.0, 99.0)]
    assert order == [("full", True), ("selective", True), ("offload", False), *not_fitting]
    assert ranking.best(workload, 100.0).layout.recompute == "full"  # type: ignore[union-attr]
    assert ranking.best(workload, 10.0) is None
    (first, *_) = ranked(workload, 100.0)
    assert (first.memory.total, first.host_bytes, first.relative_speed) == (20.0, 0.0, 0.5)


def test_as_few_layers_run_again_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer that is stored takes 2 bytes more, and 94 % of the GPU may be filled; 97 % where no layer is."""

    def sizes(layout: Layout) -> tuple[float, float, float]:
        count = layout.layers_again(32) if layout.recompute in ("except-attention", "full") else 0
        size = {"none": 200.0, "selective": 90.0, "except-attention": 90.0, "full": 85.0, "offload": 10.0}
        return size[layout.recompute] - 2 * count, 0.0, 0.9 - count / 100

    played(monkeypatch, sizes)

    def found(gpu: float, **given: Any) -> dict[tuple[str, int | None], float]:
        choices = ranked(Workload(gpus=1, **given), gpu)
        fitting = [each for each in choices if each.fits]
        return {(each.layout.recompute, each.layout.recompute_layers): each.memory.total for each in fitting}

    whole = {("except-attention", None): 26.0, ("full", None): 21.0, ("offload", None): 10.0}
    # 94 % of 50 is 47: 90 − 2 · 22 = 46 and 85 − 2 · 19 = 47.
    assert found(50.0) == {("except-attention", 22): 46.0, ("full", 19): 47.0, **whole}
    # All but one layer can be stored, or all of them.
    assert found(92.0)["except-attention", 2] == 86.0 and ("full", 1) not in found(97.0)
    assert found(93.0) == {("selective", None): 90.0, ("except-attention", None): 26.0, ("full", None): 21.0} | {
        ("offload", None): 10.0
    }
    # As many as were asked for, and none besides.
    assert found(50.0, recompute_layers=25) == {
        ("except-attention", 25): 40.0, ("full", 25): 35.0, ("offload", 25): 10.0
    }  # fmt: skip
    # Nothing is stored where all must run again to fit, or where not even that fits.
    assert found(27.5) == {("except-attention", None): 26.0, ("full", 30): 25.0, ("full", None): 21.0} | {
        ("offload", None): 10.0
    }


@pytest.mark.parametrize(("given", "gpu", "contexts"), [(None, 100.0, {1}), (None, 1.0, {1, 2, 4}), (2, 1.0, {2})])
def test_rows_are_split_only_where_nothing_fits(
    monkeypatch: pytest.MonkeyPatch, given: int | None, gpu: float, contexts: set[int]
) -> None:
    played(monkeypatch, lambda _: (50.0, 0.0, 1.0))
    found = ranked(Workload(gpus=4, context_parallel_size=given), gpu)
    assert {each.layout.context_parallel_size for each in found} == contexts


def choice(recompute: str = "none", ep: int = 1, speed: float = 1.0, context: int = 1) -> Choice:
    return Choice(Layout(1, ep, recompute, context), Memory(0, 0, 0, 0, 0, 0, 0), 0.0, True, speed)


def test_a_larger_micro_batch_is_reported_if_it_gains_five_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens: 512 bring nothing, 1,024 21 %, 2,048 43 %, and 4,096 would 53 %."""
    answers: dict[int, Choice | None] = {2: choice(), 4: choice(), 8: choice(), 16: None}
    seen: list[Any] = []

    def best(workload: Workload, gpu_memory: float) -> Choice | None:
        seen.append((workload.micro_batch_size, gpu_memory, workload.context_parallel_size))
        return answers[workload.micro_batch_size]

    monkeypatch.setattr(ranking, "best", best)
    workload = Workload(seq_length=256)
    assert faster_micro_batch(workload, choice(), 80.0) == (8, answers[8], pytest.approx(1.0 / 0.7))
    assert seen == [(2, 80.0, 1), (4, 80.0, 1), (8, 80.0, 1), (16, 80.0, 1)]
    # Offloading is never suggested; a slower layout takes its part of the gain.
    answers[8], answers[4] = choice("offload"), choice(speed=0.9)
    assert faster_micro_batch(workload, choice(), 80.0) == (4, answers[4], pytest.approx(0.85 * 0.9 / 0.7))
    answers[4] = choice(speed=0.7 / 0.85 * 1.0501)
    assert faster_micro_batch(workload, choice(), 80.0) is not None
    answers[4] = choice(speed=0.7 / 0.85 * 1.0499)
    assert faster_micro_batch(workload, choice(), 80.0) is None
    # More than 8,192 tokens are not tried; experts that are shared by ranks see the tokens of all of them.
    seen.clear()
    assert faster_micro_batch(Workload(seq_length=4096), choice(), 80.0) == (2, answers[2], pytest.approx(1.14 / 1.07))
    assert [size for size, _, _ in seen] == [2]
    seen.clear()
    assert faster_micro_batch(Workload(seq_length=4097), choice(), 80.0) is None and seen == []
    answers[2] = choice(ep=4)
    size, _, gain = faster_micro_batch(Workload(seq_length=512), choice(ep=2), 80.0) or (0, None, 0.0)
    assert (size, gain) == (2, pytest.approx(1.07 / 0.85))
    answers[2], answers[4] = choice(context=2), None
    size, _, gain = faster_micro_batch(Workload(seq_length=1024), choice(context=2, speed=0.5), 80.0) or (0, None, 0.0)
    assert (size, gain) == (2, pytest.approx(0.85 / (0.70 * 0.5)))
    assert seen[-1][2] == 2


@pytest.mark.parametrize(
    ("length", "micro", "batch", "allowed"),
    [(512, 1, 8, True), (512, 1, 7, False), (511, 1, 8, False), (512, 2, 8, True), (512, 4, 8, False)],
)
def test_what_a_layout_must_split(length: int, micro: int, batch: int, allowed: bool) -> None:
    """Two ranks share each row, of eight: a step has four micro batches."""
    from mixtral_run.config.verbs.training import FinetuneConfig

    config = object.__new__(FinetuneConfig)
    for name, value in (("micro_batch_size", micro), ("seq_length", length), ("global_batch_size", batch)):
        object.__setattr__(config, name, value)
    assert spread.allows(config, Layout(2, 1, "none"), 8) is allowed
    assert spread.allows(SimpleNamespace(), Layout(2, 1, "none"), 8)  # type: ignore[arg-type]


def test_memory_of_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(100.0, 1.0, 2.0, 3.0, 10.0, 5.0, 7.0)
    monkeypatch.setattr(spread, "memory", lambda *_: memory)
    monkeypatch.setattr(spread, "weight_bytes", lambda *_: 50.0)
    config: Any = SimpleNamespace()
    assert spread.needed_bytes(config, Workload(), Layout(1, 1, "none")) == 50 + 7 + 2_147_483_648
    assert math.isclose(memory.total, 128.0) and memory.allocated == 121.0


def test_flags_and_names_of_layouts() -> None:
    assert Layout(2, 4, "none").flags() == (
        "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --recompute none"
    )
    assert Layout(2, 4, "full", 2, 3).flags() == (
        "--tensor-model-parallel-size 2 --context-parallel-size 2 --expert-model-parallel-size 4 --recompute full "
        "--expert-chunks 3"
    )
    assert Layout(1, 1, "full", recompute_layers=7).flags().endswith("--recompute full --recompute-layers 7")
    assert Layout(2, 4, "full", 3).ranks_of_a_row == 6
    workload = Workload(seq_length=100, micro_batch_size=3, rows_per_sample=2)
    assert (workload.rows, workload.tokens(Layout(1, 1, "none", 4))) == (6, 150)
    assert workload.expert_tokens(Layout(1, 1, "full", 4, 4)) == 38
    assert MIXTRAL_8X7B is workload.architecture


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {1, 2, 4, 8}),
        # Padded to a multiple of 128 · TP where TP does not divide it: 32,256 / 4 = 8,064 and 32,768 / 8 = 4,096.
        ({"vocab_size": 32002}, {4, 8}),
        # TP divides it: 16,008, 8,004 and 4,002 are no multiples of 16.
        ({"vocab_size": 32016}, {1}),
        ({"hidden_size": 4104}, set()),
        # 1,026 is padded to 1,536 with TP4; the keys and values of 2 groups cannot be split over 4.
        ({"vocab_size": 1026, "num_query_groups": 2}, set()),
    ],
)
def test_attention_in_8_bit_leaves_out_layouts_whose_sides_are_no_multiples_of_16(
    changes: dict[str, int], sizes: set[int]
) -> None:
    architecture = dataclasses.replace(MIXTRAL_8X7B, **changes)  # type: ignore[arg-type]
    workload = Workload(architecture=architecture, attention_precision="fp8")
    assert {each.layout.tensor_model_parallel_size for each in ranked(workload, math.inf)} == sizes
    assert architecture.aligned_tensor_sizes(16) == sorted(sizes)
    problems = ranking.eight_bit_problems(workload, {1, 2, 4, 8})
    assert len(problems) == (not sizes) and all("no --tensor-model-parallel-size makes" in each for each in problems)

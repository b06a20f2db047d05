"""Sums of gradients that overlap the backward pass, over real process groups: the same gradients as after the pass, and
the same order of the sums on all ranks.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.conftest import torchrun
from tests.multiprocess.training.exchange_worker import CASES, FOUR, STEPS, TWO

WORKER = Path(__file__).parent / "exchange_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By case, and in it by rank."""
    folder = tmp_path_factory.mktemp("exchange")
    found: dict[str, list[dict[str, Any]]] = {}
    for count, cases in ((2, TWO), (4, FOUR)):
        out = folder / f"on{count}.json"
        torchrun(count, WORKER, str(out), *cases)
        found |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_steps_are_those_of_sums_after_the_pass(case: str, results: dict[str, Any]) -> None:
    """With two ranks to the bit; a ring of more adds up in another order where buffers are other ones."""
    for rank in results[case]:
        after, during = rank["losses"]
        assert len(during) == STEPS and all(0 < norm < 10 for _, norm in during)
        assert rank["difference"] <= 3e-7, rank["difference"]
        assert rank["equal"] or case not in TWO
        assert rank["retaken"] == [STEPS * ("again" in case and "taken" in case)] * 2
        for one, other in zip(after, during, strict=True):
            assert one == pytest.approx(other, rel=0 if case in TWO else 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_of_a_group_call_the_same_sums_in_the_same_order(case: str, results: dict[str, Any]) -> None:
    orders: dict[str, list[list[int]]] = {}
    for number, rank in enumerate(results[case]):
        sums = [each for each in rank["log"] if isinstance(each, list)]
        assert len(sums) >= 4 * STEPS and all(number in ranks for ranks, _ in sums)
        for group in {str(ranks) for ranks, _ in sums}:
            orders.setdefault(group, []).append([size for ranks, size in sums if str(ranks) == group])
    for group, of_ranks in orders.items():
        assert len(of_ranks) == len(json.loads(group)) and all(each == of_ranks[0] for each in of_ranks), group


@pytest.mark.parametrize("case", CASES)
def test_sums_begin_before_the_last_pass_of_a_step_ends(case: str, results: dict[str, Any]) -> None:
    """All but the last stage, in which the pass ends; none in the passes before, whose gradients are not whole."""
    for number, rank in enumerate(results[case]):
        if number == 1 and 0 in CASES[case].missing:
            # The lowest layer of this rank gets no gradient that would show the end.
            continue
        step = f"E{{{CASES[case].micro_batches - 1}}}s{{3,}}Es+" * (1 + rank["retaken"][1] // STEPS)
        log = "".join({"step": " ", "end": "E"}.get(str(each), "s") for each in rank["log"])
        assert re.fullmatch(f"( {step}){{{STEPS}}}", log), log
        assert not any(isinstance(each, list) for each in rank["log without"])


def test_two_runs_are_equal(results: dict[str, Any]) -> None:
    twice = [case for case in CASES if CASES[case].twice]
    assert len(twice) == 2 and all(rank["repeats"] for case in twice for rank in results[case])


@pytest.mark.parametrize(
    ("case", "share"),
    [("data", 0), ("shared, from weights", 0), ("experts", 0), ("experts, shared", 0.5), ("context", 0)],
)
def test_what_no_sum_of_its_own_serves_is_left(case: str, share: float, results: dict[str, Any]) -> None:
    assert {rank["rest"] for rank in results[case]} == {share}


def test_groups_that_also_serve_the_pass_are_left(results: dict[str, Any]) -> None:
    """Under TP, a part of the adapters of attention."""
    assert all(0 < rank["rest"] < 0.6 for rank in results["tensors"])

"""Sums of gradients that overlap the backward pass, over real process groups: the same gradients as after the pass, and
the same order of the sums on all ranks.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.conftest import torchrun
from tests.multiprocess.training.exchange_worker import AFTER, CASES, DURING, STEPS

WORKER = Path(__file__).parent / "exchange_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By case, and in it by rank."""
    out = tmp_path_factory.mktemp("exchange") / "found.json"
    torchrun(2, WORKER, str(out))
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_steps_are_those_of_sums_after_the_pass(case: str, results: dict[str, Any]) -> None:
    """To the bit, since there are two ranks; a ring of more adds up in another order where buffers are other ones."""
    for rank in results[case]:
        after, during = rank["losses"]
        assert len(during) == STEPS and all(0 < norm < 10 for _, norm in during)
        assert rank["equal"], rank["difference"]
        assert after == during


@pytest.mark.parametrize("case", DURING)
def test_all_ranks_call_the_same_sums_in_the_same_order(case: str, results: dict[str, Any]) -> None:
    logs = [[each for each in rank["log"] if isinstance(each, list)] for rank in results[case]]
    assert len(logs[0]) >= 4 * STEPS and all(each == logs[0] for each in logs)
    assert all(ranks == [*range(len(logs))] for ranks, _ in logs[0])


@pytest.mark.parametrize("case", DURING)
def test_sums_begin_before_the_last_pass_of_a_step_ends(case: str, results: dict[str, Any]) -> None:
    """All but the last stage, in which the pass ends; none in the passes before, whose gradients are not whole."""
    for number, rank in enumerate(results[case]):
        assert rank["said"] == f"Gradients are summed during the backward pass, in {rank['stages']} stages"
        if number == 1 and 0 in CASES[case].missing:
            # The lowest layer of this rank gets no gradient that would show the end.
            continue
        log = "".join({"step": " ", "end": "E"}.get(str(each), "s") for each in rank["log"])
        assert re.fullmatch(f"( E{{{CASES[case].micro_batches - 1}}}s{{3,}}Es+){{{STEPS}}}", log), log


@pytest.mark.parametrize("case", AFTER)
def test_a_pass_with_collectives_of_its_own_overlaps_none(case: str, results: dict[str, Any]) -> None:
    for rank in results[case]:
        assert rank["stages"] == 0 and "after the backward pass: the pass has collectives of its own" in rank["said"]
        assert {*map(str, rank["log"])} == {"step", "end"} and len(rank["log"]) == STEPS * (
            1 + CASES[case].micro_batches
        )
        assert rank["log"] == rank["log without"]


def test_two_runs_are_equal(results: dict[str, Any]) -> None:
    twice = [case for case in CASES if CASES[case].twice]
    assert len(twice) == 2 and all(rank["repeats"] for case in twice for rank in results[case])

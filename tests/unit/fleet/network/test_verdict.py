"""Rounds of pairs, and what their figures say."""

from __future__ import annotations

import itertools
import json

import pytest

from mixtral_run.fleet.network.measure import result_of, rows_of
from mixtral_run.fleet.network.verdict import PairResult, judge, rounds


def pair(one: str, other: str, rate: float | None, **more: object) -> PairResult:
    return PairResult(hosts=(one, other), gb_per_second=rate, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", range(2, 9))
def test_every_pair_is_measured_once_and_no_host_twice_at_a_time(count: int) -> None:
    names = [f"gpu-{number}" for number in range(count)]
    found = rounds(names)
    assert len(found) == count - 1 + count % 2
    assert all(len({host for one in each for host in one}) == 2 * len(each) for each in found)
    pairs = [frozenset(one) for each in found for one in each]
    assert sorted(map(sorted, pairs)) == [list(each) for each in itertools.combinations(names, 2)]


def test_a_bad_host_is_named_and_not_its_links() -> None:
    rates = {
        ("a", "b"): 400.0,
        ("a", "c"): 390.0,
        ("b", "c"): 410.0,
        ("a", "d"): 20.0,
        ("b", "d"): 21.0,
        ("c", "d"): None,
    }
    results = [pair(*hosts, rate, error="" if rate else "no answer") for hosts, rate in rates.items()]
    verdict = judge(results, {}, None)
    (problem,) = verdict.problems
    assert problem.startswith("d: slow or failing with every other host")
    assert set(verdict.remarks) == {"a – d", "b – d", "c – d"}
    assert "20 GB/s; expected at least 205 GB/s, half of the best pair's 410" in verdict.remarks["a – d"]


def test_a_pair_that_is_bad_alone_is_a_link() -> None:
    results = [pair("a", "b", 400.0), pair("a", "c", 12.0), pair("b", "c", 410.0)]
    (problem,) = judge(results, {}, None).problems
    assert problem.startswith("a – c: 12 GB/s")


def test_two_hosts_have_only_a_floor_to_be_compared_with() -> None:
    results = [pair("a", "b", 3.0)]
    assert judge(results, {}, None).problems == () == judge(results, {}, 2.9).problems
    assert judge(results, {}, 4.0).problems == ("a – b: 3 GB/s; expected at least 4 GB/s",)


def test_nothing_that_can_be_compared_names_no_host() -> None:
    results = [pair(*hosts, None, error="x") for hosts in (("a", "b"), ("a", "c"), ("b", "c"))]
    assert judge(results, {}, None).problems == ("a – b: x", "a – c: x", "b – c: x")


@pytest.mark.parametrize(
    ("transports", "words"),
    [
        ({"IB/GDRDMA": 32}, ""),
        ({"IB": 32}, "RDMA without GPUDirect"),
        ({"Socket": 32}, "NCCL fell back to sockets"),
        ({"IB/GDRDMA": 30, "Socket": 2}, "NCCL fell back to sockets"),
        ({}, ""),
    ],
)
def test_what_nccl_used_is_compared_with_the_devices(transports: dict[str, int], words: str) -> None:
    results = [pair("a", "b", 400.0, backend="nccl", transports=transports)]
    problems = judge(results, {"a": ("mlx5_0",), "b": ("mlx5_0",)}, None).problems
    assert [words in each for each in problems] == ([True] if words else [])
    assert judge(results, {"a": ("mlx5_0",), "b": ()}, None).problems == (), "one of the hosts has no devices"


def test_the_answer_of_a_host_is_not_trusted() -> None:
    good = {"all_reduce_gb_per_second": 1.5, "size_mib": 64, "backend": "gloo", "transports": {}}
    assert result_of(("a", "b"), f"some line\n{json.dumps(good)}\n").gb_per_second == 1.5
    for odd in ("", "{", "[]", json.dumps({**good, "backend": "x"}), json.dumps({**good, "transports": 3}),
                json.dumps({**good, "all_reduce_gb_per_second": "1"}), '{"all_reduce_gb_per_second": NaN}',
                json.dumps({**good, "all_reduce_gb_per_second": -1}),
                json.dumps({**good, "transports": {"IB": []}})):  # fmt: skip
        found = result_of(("a", "b"), odd)
        assert found.gb_per_second is None and "not in the expected form" in found.error
    assert "\x1b" not in str(result_of(("a", "b"), "\x1b[2J"))


def test_the_table() -> None:
    results = [pair("a", "b", 1.23456, backend="gloo"), pair("a", "c", None, error="no answer")]
    _, rows = rows_of(results, judge(results, {}, None))
    assert rows == [("✓ a – b", "1.235", "gloo", ""), ("! a – c", "", "", "no answer")]

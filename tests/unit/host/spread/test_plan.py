"""Rounds of copies from host to host, for fleets of any size in which sources fail. The spread is acted out here."""

import math
import random

import pytest
from ansible.module_utils.mixtral_run_host.spread.plan import (
    MOST_FAILURES,
    NONE,
    ORIGIN,
    OWN,
    SHARED,
    Holder,
    Member,
    agreed,
    next_round,
    num_rounds,
)


class Fleet:
    """STAND-IN for a fleet: copies succeed unless the pair of host and source is broken. It keeps who served when."""

    def __init__(self, origins: dict[str, str], have: set[str], broken: set[tuple[str, str]]) -> None:
        self.origins, self.have, self.broken = origins, set(have), broken
        self.tried: dict[str, list[str]] = {name: [] for name in origins}
        self.rounds: list[dict[str, str]] = []

    def members(self) -> list[Member]:
        return [Member(name, name in self.have, self.origins[name], tuple(self.tried[name])) for name in self.origins]

    def run(self, per_source: int, from_origin: int) -> "Fleet":
        while plan := next_round(self.members(), per_source, from_origin):
            self.check(plan, per_source)
            self.rounds.append(plan)
            for name, source in plan.items():
                if (name, source) in self.broken:
                    self.tried[name].append(source)
                else:
                    self.have.add(name)
            assert len(self.rounds) < 1000
        return self

    def check(self, plan: dict[str, str], per_source: int) -> None:
        """Compare one round with what must hold, from the state of this class alone."""
        assert not set(plan) & self.have, "a host that has it copies again"
        for name, source in plan.items():
            assert source not in self.tried[name], "a source that failed this host is tried again"
            assert source == ORIGIN or source in self.have, "a source serves before it has it"
            assert source != ORIGIN or self.origins[name] != NONE
        served = [source for source in plan.values() if source != ORIGIN]
        assert all(served.count(source) <= per_source for source in served)


def _names(count: int) -> list[str]:
    return [f"gpu-{number:02}" for number in range(count)]


@pytest.mark.parametrize(("count", "per_source", "rounds"), [(8, 1, 3), (8, 2, 2), (64, 1, 6), (64, 2, 4), (1, 2, 0)])
def test_a_fleet_takes_one_copy_from_outside_and_as_many_rounds_as_a_tree_is_deep(
    count: int, per_source: int, rounds: int
) -> None:
    fleet = Fleet(dict.fromkeys(_names(count), SHARED), set(), set()).run(per_source, 1)
    assert fleet.have == set(fleet.origins)
    sources = [source for plan in fleet.rounds for source in plan.values()]
    assert sources.count(ORIGIN) == 1 and len(sources) == count
    assert len(fleet.rounds) == 1 + rounds and rounds == math.ceil(math.log(count, per_source + 1) - 1e-9)
    assert num_rounds(count, 0, per_source) == rounds


def test_every_host_gets_it_once_whatever_fails_if_a_way_to_it_is_left() -> None:
    """Random fleets, holders, limits and broken pairs; each round is checked by `Fleet.check`."""
    for seed in range(200):
        _spread_in_a_random_fleet(seed)


def _spread_in_a_random_fleet(seed: int) -> None:
    dice = random.Random(seed)
    names = _names(dice.randrange(1, 40))
    origins = {name: dice.choices((SHARED, OWN, NONE), (6, 1, 2))[0] for name in names}
    have = {name for name in names if dice.random() < dice.choice((0, 0.2))}
    rate = dice.choice((0, 0.05, 0.3, 0.9))
    broken = {(name, source) for name in names for source in (*names, ORIGIN) if dice.random() < rate}
    fleet = Fleet(origins, have, broken).run(dice.randrange(1, 5), dice.randrange(1, 3))
    copies = [name for plan in fleet.rounds for name, source in plan.items() if (name, source) not in broken]
    assert sorted(copies) == sorted(fleet.have - have), f"{seed}: a host got it twice"
    # A host is given up only after every way to it failed: outside, and each source that has not failed others.
    failures = [source for tried in fleet.tried.values() for source in tried]
    usable = {name for name in fleet.have if failures.count(name) < MOST_FAILURES}
    for name in set(names) - fleet.have:
        assert origins[name] == NONE or ORIGIN in fleet.tried[name], seed
        assert usable <= set(fleet.tried[name]), seed


def test_nothing_fails_and_nobody_goes_outside_while_a_host_has_it() -> None:
    fleet = Fleet(dict.fromkeys(_names(20), SHARED), {"gpu-07"}, set()).run(2, 1)
    assert ORIGIN not in [source for plan in fleet.rounds for source in plan.values()] and len(fleet.rounds) == 3


def test_a_dead_source_is_replaced() -> None:
    names = _names(6)
    fleet = Fleet(dict.fromkeys(names, NONE), {"gpu-00", "gpu-01"}, {(name, "gpu-00") for name in names}).run(2, 1)
    assert fleet.have == set(names)
    served = [source for plan in fleet.rounds for source in plan.values()]
    assert served.count("gpu-00") == MOST_FAILURES, "it is asked again after it failed several hosts"


def test_hosts_that_cannot_reach_each_other_go_outside_side_by_side() -> None:
    """One at a time would take days: after the first source failed twice, all others go at once."""
    names = _names(16)
    broken = {(name, source) for name in names for source in names}
    fleet = Fleet(dict.fromkeys(names, SHARED), set(), broken).run(2, 1)
    assert fleet.have == set(names) and len(fleet.rounds) == 3


def test_hosts_that_go_their_own_way_take_what_is_there_or_go_outside() -> None:
    alone = [Member("gpu-02", False, SHARED, ())]
    assert next_round(alone, 2, 1, waits=False) == {"gpu-02": ORIGIN}
    holders = [Member(f"gpu-1{number}", True, SHARED, ()) for number in range(8)]
    chosen = [next_round([*holders, Member(name, False, SHARED, ())], 2, 1, waits=False)[name] for name in _names(8)]
    assert len(set(chosen)) > 2, "all of them go to the same host"
    tried = tuple(each.name for each in holders)
    assert next_round([*holders, Member("gpu-02", False, SHARED, tried)], 2, 1, waits=False) == {"gpu-02": ORIGIN}


@pytest.mark.parametrize(
    ("holders", "preferred", "content"),
    [
        ([], "", None),
        ([Holder("a", "x", False), Holder("b", "x", False)], "", "x"),
        ([Holder("a", "x", False), Holder("b", "y", False)], "", None),
        ([Holder("a", "x", False), Holder("b", "y", False)], "b", "y"),
        ([Holder("a", "x", False), Holder("b", "y", True)], "a", "y"),
    ],
)
def test_what_came_from_outside_counts_and_hosts_that_disagree_serve_nobody(
    holders: list[Holder], preferred: str, content: str | None
) -> None:
    assert agreed(holders, preferred) == content

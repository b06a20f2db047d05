"""Plan of a spread from host to host. Pure: it computes one round from what each host has and from what failed before.

A round is a set of copies that run at the same time. Each host that has the files serves at most `per_source` others in
a round, and every host that got them serves in the next one: with one child each, 8 hosts take one copy from outside and
3 rounds, with two children 2 rounds. A host whose source failed is planned again, with another source.
"""

from __future__ import annotations

import zlib
from collections import Counter, namedtuple

ORIGIN = ""
"""Name of the source outside the fleet: the hub, a registry, a build, the operator's machine."""
SHARED, OWN, NONE = "shared", "own", "none"
"""What a host may take from outside. shared: only if no host can serve it. own: always, because it is its own (a folder
on the host). none: nothing."""
SOURCE, NOBODY, ME = "source", "nobody", "me"
"""Who is to blame for a failed copy. me: the host that copies, for example because its disk is full; it copies nothing
more. nobody: it cannot be known, so the host tries another source, and the source serves others."""
MOST_FAILURES = 2
"""A source that failed this many hosts serves nobody else. Each host that it served counts for as many again."""
MOST_SOURCES = 3
"""A host that so many sources failed cannot reach the others, and takes the files from outside."""

Member = namedtuple("Member", "name holds origin tried blamed got ended", defaults=((), None, False))
"""A host of the spread. holds: it has the files and may serve them. tried: sources that failed it, perhaps ORIGIN.
blamed: those of them that are to blame. got: source that gave it the files in this play. ended: it copies no more."""
Holder = namedtuple("Holder", "name key fresh")
"""A host that has the files. key: what identifies their bytes. fresh: round in which it took them from outside; or 0."""


def next_round(members, per_source, from_origin, waits=True):
    """Return the source of each host that copies in the next round: its name, or ORIGIN. Hosts that wait are missing.

    members: all hosts of the spread, in an order that is the same for all who compute the plan.
    per_source: copies that a source serves at once.
    from_origin: copies from outside at once. The number doubles with each source that served nobody and was given up:
        where hosts cannot reach each other, one copy from outside at a time would take days.
    waits: the hosts go from round to round together. If not, a host that no source is left for takes it from outside.
    Nothing is returned for anybody once nothing is left to try.
    """
    failures = Counter(source for member in members for source in member.blamed)
    served = Counter(member.got for member in members if member.got is not None)
    useless = {name for name in failures if failures[name] >= MOST_FAILURES * (1 + served[name])}
    usable = [member.name for member in members if member.holds and member.name not in useless]
    lacking = [member for member in members if not member.holds and not member.ended]
    found = {each.name: ORIGIN for each in lacking if each.origin == OWN and ORIGIN not in each.tried}
    rest = [each for each in lacking if each.name not in found]
    load = Counter()
    # Hosts with the fewest sources left choose first.
    for member in sorted(rest, key=lambda each: len(set(usable) - set(each.tried))):
        if len(set(member.tried) - {ORIGIN}) >= MOST_SOURCES and _may_go_outside(member):
            continue
        free = [name for name in usable if name not in member.tried and load[name] < per_source]
        if free:
            source = min(free, key=lambda name: (failures[name], load[name], 0 if waits else _lot(member, name)))
            found[member.name] = source
            load[source] += 1
    if found and waits:
        return found
    outside = [each.name for each in rest if each.name not in found and _may_go_outside(each)]
    # An outside that fails host after host ends the play soon.
    bad = len(useless - {ORIGIN}) + (0 if served[ORIGIN] else failures[ORIGIN])
    limit = len(outside) if not waits else from_origin << min(bad, 20)
    found.update((name, ORIGIN) for name in outside[:limit])
    return found


def _may_go_outside(member):
    return member.origin != NONE and ORIGIN not in member.tried


def _lot(member, source):
    """Return a number that differs from host to host: hosts that do not know of each other should not all choose alike."""
    return zlib.crc32("{} {}".format(member.name, source).encode())


def agreed(holders, preferred=""):
    """Return the holder whose files are spread, or None if nobody has them or the hosts disagree. holders: in order.

    What came from outside in this play first counts most, then what the host has that the operator named (`preferred`).
    Otherwise all hosts must have the same: a host that has something else is no reason to pass it on.
    """
    for some in ([each for each in holders if each.fresh], [each for each in holders if each.name == preferred]):
        if some:
            return min(some, key=lambda each: each.fresh)
    return holders[0] if len({each.key for each in holders}) == 1 else None


def num_rounds(num_lacking, num_holders, per_source):
    """Return the rounds of copies that a spread takes if nothing fails, without the copy from outside."""
    rounds, have = 0, max(num_holders, 1)
    missing = num_lacking - (0 if num_holders else 1)
    while missing > 0:
        grown = min(missing, have * per_source)
        missing, have, rounds = missing - grown, have + grown, rounds + 1
    return rounds

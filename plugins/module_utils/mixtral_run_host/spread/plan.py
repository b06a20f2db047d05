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
MOST_FAILURES = 2
"""A source that failed this many hosts serves nobody else."""

Member = namedtuple("Member", "name holds origin tried")
"""A host of the spread. holds: it has the files and may serve them. tried: sources that failed it, perhaps ORIGIN."""
Holder = namedtuple("Holder", "name content fresh")
"""A host that has the files. content: what identifies their bytes. fresh: it took them from outside in this play."""


def next_round(members, per_source, from_origin, waits=True):
    """Return the source of each host that copies in the next round: its name, or ORIGIN. Hosts that wait are missing.

    members: all hosts of the spread, in an order that is the same for all who compute the plan.
    per_source: copies that a source serves at once.
    from_origin: copies from outside at once, as long as no host has the files.
    waits: the hosts go from round to round together. If not, a host that no source is left for takes it from outside.
    Nothing is returned for anybody once nothing is left to try.
    """
    failures = Counter(source for member in members for source in member.tried)
    holders = [member.name for member in members if member.holds]
    usable = [name for name in holders if failures[name] < MOST_FAILURES]
    lacking = [member for member in members if not member.holds]
    found = {each.name: ORIGIN for each in lacking if each.origin == OWN and ORIGIN not in each.tried}
    rest = [each for each in lacking if each.name not in found]
    load = Counter()
    # Hosts with the fewest sources left choose first.
    for member in sorted(rest, key=lambda each: len(set(usable) - set(each.tried))):
        free = [name for name in usable if name not in member.tried and load[name] < per_source]
        if free:
            source = min(free, key=lambda name: (failures[name], load[name], 0 if waits else _lot(member, name)))
            found[member.name] = source
            load[source] += 1
    if found and waits:
        return found
    outside = [
        each.name for each in rest if each.name not in found and each.origin != NONE and ORIGIN not in each.tried
    ]
    # With holders that nobody can reach, or an outside that fails host after host, one at a time would take days.
    alone = holders or failures[ORIGIN] >= MOST_FAILURES or not waits
    found.update((name, ORIGIN) for name in (outside if alone else outside[:from_origin]))
    return found


def _lot(member, source):
    """Return a number that differs from host to host: hosts that do not know of each other should not all choose alike."""
    return zlib.crc32("{} {}".format(member.name, source).encode())


def agreed(holders, preferred=""):
    """Return the content that is spread, or None if nobody has it or the hosts disagree. holders: in a fixed order.

    What came from outside in this play counts first, then what the host has that the operator named (`preferred`).
    Otherwise all hosts must have the same: a host that has something else is no reason to pass it on.
    """
    for some in ([each for each in holders if each.fresh], [each for each in holders if each.name == preferred]):
        if some:
            return some[0].content
    contents = {each.content for each in holders}
    return contents.pop() if len(contents) == 1 else None


def num_rounds(num_lacking, num_holders, per_source):
    """Return the rounds of copies that a spread takes if nothing fails, without the copy from outside."""
    rounds, have = 0, max(num_holders, 1)
    missing = num_lacking - (0 if num_holders else 1)
    while missing > 0:
        grown = min(missing, have * per_source)
        missing, have, rounds = missing - grown, have + grown, rounds + 1
    return rounds

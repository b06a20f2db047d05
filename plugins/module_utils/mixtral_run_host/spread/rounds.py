"""What one host does in the next round of a spread, from what all hosts of a play reported. Pure."""

from __future__ import annotations

import math
import re

from ..files import explain
from ..model.model_cache import checked_commit, checked_files, listing_digest
from .blobs import CopyError
from .plan import ME, NOBODY, ORIGIN, SHARED, SOURCE, Holder, Member, agreed, next_round, num_rounds

_WAY = ("address", "port", "user", "folder")


def plan_of(me, hosts, arguments, waits):
    """Return what one host does in the next round. hosts: variables of all hosts of the play, by name, in order.

    A host reports what it has and nothing else. Its name, how others reach it and what it may take from outside come from
    the inventory, and what identifies its files is computed here. A report that is not in its form is left out.
    """
    reports, problems = _reports(hosts, arguments)
    if me not in reports:
        return _left_out(me, problems.get(me, "there is none"), arguments)
    mine = reports[me]
    # Only hosts that want the same files, and of these the attempts since they looked last.
    reports = {name: each for name, each in reports.items() if each["identity"] == mine["identity"]}
    number = _round_of(hosts[me], mine, arguments) + 1
    looks, attempts = dict(reports), {}
    for name, report in looks.items():
        attempts[name] = _attempts(hosts.get(name, {}), report, arguments)
        got = next((each for each in attempts[name] if each["got"]), None)
        reports[name] = got["got"] if got else report
        problems.update((name, each["problem"]) for each in attempts[name] if each["problem"])
    if waits:
        # A host without the files that was not in the last round has left the play. It would be waited for in vain.
        rounds = {name: _round_of(hosts.get(name, {}), looks[name], arguments) for name in reports}
        reports = {name: each for name, each in reports.items() if each["holds"] or rounds[name] >= number - 1}
    holders = [Holder(name, each["key"], _fresh(attempts[name])) for name, each in reports.items() if each["holds"]]
    first = agreed(holders, arguments.get("preferred") or "")
    members = [
        _member(name, each, attempts[name], _way(name, hosts, arguments))
        for name, each in reports.items()
        if (not each["holds"] or (first and each["key"] == first.key)) and (waits or each["holds"] or name == me)
    ]
    plan = next_round(members, int(arguments["per_source"]), int(arguments["from_origin"]), waits)
    source = plan.get(me) or ""
    way = _way(source, hosts, arguments) if source else {}
    return {
        **_words(me, plan, members, attempts, hosts, arguments),
        "source": source,
        **{name: way.get(name, "") for name in _WAY},
        # Never the source's own: it would state the hashes of the bytes that it gives.
        "content": reports[first.name]["content"] if source else "",
        "copies": me in plan,
        "again": bool(plan),
        "round": number,
        "looked": mine["looked"],
        "waits": waits,
        "warnings": _warnings(holders, first, problems, arguments["what"]),
    }


def _left_out(me, problem, arguments):
    message = explain(
        arguments["failure"], where=me, expected="a report of what this host has", found=problem,
        next_step="look at this host: it runs the modules of the kit, and answers something else",
    )  # fmt: skip
    return {"msg": message, "again": False, "copies": False, "source": "", "warnings": []}


def _warnings(holders, first, problems, what):
    odd = sorted(each.name for each in holders if first is None or each.key != first.key)
    found = [f"{what}: another version is on {', '.join(odd)}, and is not passed on"] if odd else []
    return found + [
        f"{what}: {name} is left out, it reported nonsense: {why}" for name, why in sorted(problems.items())
    ]


def _reports(hosts, arguments):
    """Return what the hosts reported, by the name in the inventory, and why some reports are left out.

    The first look is each host's own. Further ones were at the preferred host, for the case that it is not in the play.
    """
    look, *visits = arguments["looks"]
    given = [(name, variables.get(look)) for name, variables in hosts.items()]
    preferred = arguments.get("preferred") or ""
    if preferred and preferred not in hosts:
        given += [(preferred, variables.get(visit)) for visit in visits for variables in hosts.values()]
    found, problems = {}, {}
    for name, answer in given:
        report = answer.get("spread") if isinstance(answer, dict) else None
        if report and name not in found:
            try:
                found[name] = _checked(report)
            except (ValueError, CopyError) as error:
                problems[name] = str(error)
    return found, {name: why for name, why in problems.items() if name not in found}


def _checked(report, identity=None):
    """Return a host's report with the key that follows from its content. Raise ValueError or CopyError for nonsense."""
    if not isinstance(report, dict):
        raise ValueError("a report is no object")
    looked, holds = report.get("looked"), report.get("holds")
    if not isinstance(report.get("identity"), str) or identity not in (None, report["identity"]):
        raise ValueError("identity {!a:.100}".format(report.get("identity")))
    if isinstance(looked, bool) or not isinstance(looked, (int, float)) or not math.isfinite(looked):
        raise ValueError("looked {!a:.100}".format(looked))
    if not isinstance(holds, bool):
        raise ValueError("holds {!a:.100}".format(holds))
    content, key = _content(report) if holds else ({}, "")
    return {"identity": report["identity"], "looked": looked, "holds": holds, "content": content, "key": key}


def _content(report):
    """Return what identifies a model or an image, from known fields only, and the key of it."""
    content = report.get("content")
    if isinstance(content, dict) and "files" in content:
        files = checked_files(content["files"], "it")
        commit = checked_commit(content.get("commit"), "it")
        if not files:
            raise ValueError("a model without files")
        return {"commit": commit, "files": [list(file) for file in files]}, listing_digest(files)
    if not isinstance(content, dict) or not re.match(r"sha256:[0-9a-f]{64}\Z", str(content.get("id"))):
        raise ValueError("content {!a:.100}".format(content))
    if content.get("inputs") != report["identity"] or not isinstance(content.get("source"), str):
        raise ValueError("inputs {!a:.100}".format(content.get("inputs")))
    return {name: content[name] for name in ("id", "inputs", "source")}, content["id"]


def _attempts(variables, report, arguments):
    """Return the copies of a host since it looked, with what it got: a checked report, or None if the copy failed."""
    found = []
    for each in variables.get(arguments["attempts"]) or []:
        if each["looked"] != report["looked"]:
            continue
        got, problem = None, None
        if each["got"]:
            try:
                got = _checked(each["got"], report["identity"])
                if not got["holds"]:
                    raise ValueError("a copy succeeded, and the host does not have the files")
            except (ValueError, CopyError) as error:
                got, problem = None, str(error)
        blame = ME if problem else each.get("blame")
        found.append(dict(each, got=got, problem=problem, blame=blame if blame in (ME, NOBODY) else SOURCE))
    return found


def _fresh(attempts):
    """Return the round in which a host took the files from outside, and 0 if it did not."""
    return next((each.get("round") or 1 for each in attempts if each["got"] and each["source"] == ORIGIN), 0)


def _member(name, report, attempts, way):
    failed = [each for each in attempts if not each["got"]]
    return Member(
        name,
        report["holds"],
        way.get("origin") or SHARED,
        tried=tuple(each["source"] for each in failed),
        blamed=tuple(each["source"] for each in failed if each["blame"] == SOURCE),
        got=next((each["source"] for each in attempts if each["got"]), None),
        ended=any(each["blame"] == ME for each in failed),
    )


def _way(name, hosts, arguments):
    """Return how other hosts reach a host, from the inventory: address, port, user and folder; and its `origin`."""
    if name not in hosts:
        return arguments.get("preferred_way") or {}
    return hosts[name].get(arguments["way"]) or {}


def _round_of(variables, report, arguments):
    """Return the last round that a host planned since it looked; 0 for none."""
    plan = variables.get(arguments["plan"]) or {}
    return plan.get("round", 0) if plan.get("looked") == report["looked"] else 0


def _words(me, plan, members, attempts, hosts, arguments):
    what, have = arguments["what"], sum(member.holds for member in members)
    lacking = [member for member in members if not member.holds]
    if not plan:
        return {"msg": _why_nobody(me, attempts[me], hosts, arguments)}
    rounds = num_rounds(len(lacking), have, int(arguments["per_source"]))
    source = plan.get(me)
    state = f"{have} of {len(members)} hosts have it, {rounds} round{'s' if rounds != 1 else ''} to go"
    if source is None:
        return {"msg": f"{what}: waits for a source ({state})", "spread_note": ""}
    note = f"{what} from {source or arguments['outside']} ({state})"
    return {"msg": note, "spread_note": note}


def _why_nobody(me, attempts, hosts, arguments):
    """Return the message of a host for which no source is left."""
    if len(attempts) == 1:
        return attempts[0]["msg"]
    found = [f"{each['source'] or arguments['outside']}: {each['found']}" for each in attempts]
    named = arguments.get("preferred") or ""
    if not found and named:
        first, *others = arguments["looks"]
        looks = [hosts.get(named, {}).get(first), *(hosts[me].get(name) for name in others)]
        problem = next((look["msg"] for look in looks if look and look.get("msg")), "it has not come to this task")
        found = [f"{named}: {problem}"]
    return explain(
        arguments["failure"],
        where=me,
        expected=arguments["what"],
        found="; ".join(found) or "no host of this play has it, and nothing outside is left to ask",
        next_step=arguments["next_step"],
    )

"""What one host does in the next round of a spread, from what all hosts of a play reported. Pure."""

from __future__ import annotations

from ..files import explain
from .plan import ORIGIN, Holder, Member, agreed, next_round, num_rounds


def plan_of(me, hosts, arguments, waits):
    """Return what one host does in the next round. hosts: variables of all hosts of the play, by name, in order."""
    reports, attempts = _reports(hosts, arguments["looks"]), {}
    mine = reports[me]
    # Only hosts that want the same files, and of these the attempts since they looked last.
    reports = {name: each for name, each in reports.items() if each["identity"] == mine["identity"]}
    number = _round_of(hosts[me], mine, arguments) + 1
    looks = dict(reports)
    for name, report in reports.items():
        attempts[name] = _attempts(hosts.get(name, {}), report, arguments)
        reports[name] = next((each["got"] for each in attempts[name] if each["got"]), report)
    if waits:
        # A host without the files that was not in the last round has left the play. It would be waited for in vain.
        rounds = {name: _round_of(hosts.get(name, {}), looks[name], arguments) for name in reports}
        reports = {name: each for name, each in reports.items() if each["holds"] or rounds[name] >= number - 1}
    fresh = {name for name, each in attempts.items() if any(one["got"] and one["source"] == ORIGIN for one in each)}
    holders = [Holder(name, each["key"], name in fresh) for name, each in reports.items() if each["holds"]]
    key = agreed(holders, arguments.get("preferred") or "")
    members = [
        Member(name, each["holds"], each["origin"], tuple(one["source"] for one in attempts[name] if not one["got"]))
        for name, each in reports.items()
        if (not each["holds"] or each["key"] == key) and (waits or each["holds"] or name == me)
    ]
    plan = next_round(members, int(arguments["per_source"]), int(arguments["from_origin"]), waits)
    odd = sorted(each.name for each in holders if each.content != key)
    return {
        **_words(me, plan, members, attempts, hosts, arguments),
        **_source(plan.get(me), reports),
        "copies": me in plan,
        "again": bool(plan),
        "round": number,
        "looked": mine["looked"],
        "waits": waits,
        "warnings": [f"{arguments['what']}: another version is on {', '.join(odd)}, and is not passed on"]
        if odd
        else [],
    }


def _reports(hosts, looks):
    """Return what the hosts reported of themselves, by name; and what hosts outside the play did that were looked at."""
    found = {}
    for look in looks:
        for variables in hosts.values():
            report = (variables.get(look) or {}).get("spread")
            if report and report["name"] not in found:
                found[report["name"]] = report
    return found


def _attempts(variables, report, arguments):
    """Return the copies of a host since it looked."""
    listed = variables.get(arguments["attempts"]) or []
    return [each for each in listed if each["looked"] == report["looked"]]


def _round_of(variables, report, arguments):
    """Return the last round that a host planned since it looked; 0 for none."""
    plan = variables.get(arguments["plan"]) or {}
    return plan.get("round", 0) if plan.get("looked") == report["looked"] else 0


def _source(source, reports):
    report = reports.get(source, {}) if source else {}
    return {
        "source": source or "",
        **{name: report.get(name, "") for name in ("address", "port", "folder", "user", "content")},
    }


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

#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the operator's machine only."""

from __future__ import annotations

DOCUMENTATION = """
module: spread_plan
short_description: Find out from which host this host takes files in the next round of a spread
description:
  - Computes the same plan on every host of the play from what the hosts reported, without a connection.
  - Returns C(source), the name of a host, or empty for a copy from outside; C(copies), false if this host waits in this
    round; C(again), true if a further round may follow; and C(address), C(port), C(user), C(folder) and C(content) of
    the source; and C(run_id), which tells the keys of this run from those of other runs. C(msg) says who takes it from whom, or why nobody can give it.
options:
  what: {description: Name of the files in messages., type: str, required: true}
  outside: {description: Name of the source outside the fleet in messages., type: str, required: true}
  looks: {description: Names of the variables in which hosts registered what they have., type: list, elements: str, required: true}
  attempts: {description: Name of the variable with the list of a host's copies in this play., type: str, required: true}
  plan: {description: Name of the variable in which this task registers its result., type: str, required: true}
  way: {description: "Name of the variable with address, port, user, folder and origin of each host, from the inventory.", type: str, required: true}
  preferred_way: {description: The same of the C(preferred) host if it is not in the play., type: dict, default: {}}
  per_source: {description: Number of hosts that a source serves at once., type: int, required: true}
  from_origin: {description: Number of hosts that copy from outside at once., type: int, required: true}
  preferred: {description: Host that the operator named., type: str, default: ""}
  failure: {description: First sentence of the message if nobody can give it., type: str, required: true}
  next_step: {description: What to do then., type: str, required: true}
"""

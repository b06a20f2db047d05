"""What a host does next, from what Ansible keeps of all hosts; and what the operator reads about it."""

from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host.spread.plan import NONE, SHARED
from ansible.module_utils.mixtral_run_host.spread.rounds import plan_of

ARGUMENTS = {
    "what": "org/model@main", "outside": "https://hub", "looks": ["look", "visit"], "attempts": "attempts",
    "plan": "plan", "per_source": 2, "from_origin": 1, "preferred": "", "failure": "It cannot be had.", "next_step": "do this",
}  # fmt: skip


def report(name: str, key: str = "", origin: str = SHARED, identity: str = "m", looked: float = 1.0) -> dict[str, Any]:
    return {
        "name": name, "identity": identity, "looked": looked, "holds": bool(key), "origin": origin, "key": key,
        "content": {"files": [key]}, "address": f"10.0.0.{name[-1]}", "port": 22, "user": "ops", "folder": "/blobs",
    }  # fmt: skip


def host(name: str, key: str = "", *attempts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"look": {"spread": report(name, key, **more)}, "attempts": list(attempts)}


def attempt(source: str, got: dict[str, Any] | None = None, looked: float = 1.0, found: str = "") -> dict[str, Any]:
    return {"source": source, "got": got or {}, "looked": looked, "msg": f"whole: {found}", "found": found}


def test_a_host_reads_from_the_host_that_has_it_and_gets_the_names_from_the_operator() -> None:
    hosts = {"h1": host("h1", "x"), "h2": host("h2"), "h3": host("h3"), "h4": host("h4")}
    plan = plan_of("h2", hosts, ARGUMENTS, True)
    assert (plan["source"], plan["address"], plan["content"]) == ("h1", "10.0.0.1", {"files": ["x"]})
    assert plan["copies"] and plan["again"]
    assert plan["spread_note"] == "org/model@main from h1 (1 of 4 hosts have it, 2 rounds to go)"
    waiting = plan_of("h4", hosts, ARGUMENTS, True)
    assert waiting["again"] and not waiting["copies"] and waiting["spread_note"] == ""


def test_the_first_goes_outside_and_what_it_got_is_what_others_take() -> None:
    hosts = {"h1": host("h1"), "h2": host("h2")}
    first = plan_of("h1", hosts, ARGUMENTS, True)
    assert first["copies"] and first["source"] == "" and "from https://hub" in first["msg"]
    assert not plan_of("h2", hosts, ARGUMENTS, True)["copies"]
    hosts["h1"] = host("h1", "", attempt("", report("h1", "x")))
    assert plan_of("h2", hosts, ARGUMENTS, True)["source"] == "h1"


def test_a_host_that_left_the_play_is_not_waited_for() -> None:
    """Its place would be planned again and again, and the others would never end."""
    hosts = {"h1": host("h1", "x"), "h2": host("h2"), "h3": host("h3")}
    arguments = ARGUMENTS | {"per_source": 1}
    for _ in range(3):
        # h2 is given the only place, and ends without an attempt.
        plan = plan_of("h3", hosts, arguments, True)
        hosts["h3"]["plan"] = plan
    assert (plan["source"], plan["round"]) == ("h1", 3)


def test_an_attempt_before_the_last_look_does_not_count() -> None:
    """The role runs twice in a play, and the model was lost in between."""
    hosts = {"h1": host("h1", "", attempt("", report("h1", "x")), looked=2.0), "h2": host("h2", looked=2.0)}
    assert not plan_of("h2", hosts, ARGUMENTS, True)["copies"] and plan_of("h1", hosts, ARGUMENTS, True)["source"] == ""


def test_hosts_with_another_version_serve_nobody_and_are_named() -> None:
    hosts = {"h1": host("h1", "x"), "h2": host("h2", "y"), "h3": host("h3")}
    plan = plan_of("h3", hosts, ARGUMENTS, True)
    assert plan["copies"] and plan["source"] == ""
    assert plan["warnings"] == ["org/model@main: another version is on h1, h2, and is not passed on"]
    hosts["h3"] = host("h3", "", attempt("", report("h3", "y")))
    hosts["h4"] = host("h4")
    plan = plan_of("h4", hosts, ARGUMENTS, True)
    assert plan["source"] in ("h2", "h3") and "another version is on h1," in plan["warnings"][0]


def test_hosts_that_want_something_else_are_left_out() -> None:
    hosts = {"h1": host("h1", "x", identity="other"), "h2": host("h2")}
    assert plan_of("h2", hosts, ARGUMENTS, True)["source"] == ""


def test_a_host_outside_the_play_serves() -> None:
    hosts = {"h2": {**host("h2", origin=NONE), "visit": {"spread": report("h9", "x")}}, "h3": host("h3", origin=NONE)}
    assert [plan_of(name, hosts, ARGUMENTS, True)["source"] for name in hosts] == ["h9", "h9"]


@pytest.mark.parametrize("waits", [True, False])
def test_a_host_that_nobody_can_serve_says_why(waits: bool) -> None:
    hosts = {"h2": {**host("h2", origin=NONE), "visit": {"msg": "it does not have org/model", "spread": {}}}}
    plan = plan_of("h2", hosts, ARGUMENTS | {"preferred": "h9"}, waits)
    assert not plan["again"] and not plan["copies"]
    assert "found:    h9: it does not have org/model" in plan["msg"] and "next:     do this" in plan["msg"]


def test_the_failures_of_all_sources_are_reported_together() -> None:
    hosts = {"h1": host("h1", "x"), "h2": host("h2", "", attempt("h1", found="slow"), attempt("", found="429"))}
    message = plan_of("h2", hosts, ARGUMENTS, True)["msg"]
    assert message.startswith("It cannot be had.") and "h1: slow; https://hub: 429" in message
    # One failure is reported in its own words.
    hosts = {"h2": host("h2", "", attempt("", found="429"))}
    assert plan_of("h2", hosts, ARGUMENTS, True)["msg"] == "whole: 429"

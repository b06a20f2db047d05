"""What a host does next, from what Ansible keeps of all hosts; and what the operator reads about it."""

import hashlib
import math
from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host.spread.plan import NONE, SHARED
from ansible.module_utils.mixtral_run_host.spread.rounds import plan_of

ARGUMENTS = {
    "what": "org/model@main", "outside": "https://hub", "looks": ["look", "visit"], "attempts": "attempts",
    "plan": "plan", "way": "way", "preferred_way": {"address": "10.9.9.9"},
    "per_source": 2, "from_origin": 1, "preferred": "", "failure": "It cannot be had.", "next_step": "do this",
}  # fmt: skip


def content(version: str) -> dict[str, Any]:
    return {"commit": "c" * 40, "files": [["model", 9, hashlib.sha256(version.encode()).hexdigest()]]}


def report(version: str = "", identity: str = "m", looked: float = 1.0) -> dict[str, Any]:
    return {
        "identity": identity, "looked": looked, "holds": bool(version), "content": content(version) if version else {},
    }  # fmt: skip


def host(name: str, version: str = "", *attempts: dict[str, Any], origin: str = SHARED, **more: Any) -> dict[str, Any]:
    way = {"address": f"10.0.0.{name[-1]}", "port": 22, "user": "ops", "folder": "/blobs", "origin": origin}
    return {"look": {"spread": report(version, **more)}, "attempts": list(attempts), "way": way}


def attempt(
    source: str, got: Any = None, looked: float = 1.0, found: str = "", blame: str = "source"
) -> dict[str, Any]:
    words = {"msg": f"whole: {found}", "found": found}
    return {"source": source, "got": got or {}, "looked": looked, "round": 1, "blame": blame, **words}


def test_a_host_reads_from_the_host_that_has_it_and_gets_the_names_from_the_operator() -> None:
    hosts = {"h1": host("h1", "x"), "h2": host("h2"), "h3": host("h3"), "h4": host("h4")}
    plan = plan_of("h2", hosts, ARGUMENTS, True)
    assert (plan["source"], plan["address"], plan["content"]) == ("h1", "10.0.0.1", content("x"))
    assert plan["copies"] and plan["again"]
    assert plan["spread_note"] == "org/model@main from h1 (1 of 4 hosts have it, 2 rounds to go)"
    waiting = plan_of("h4", hosts, ARGUMENTS, True)
    assert waiting["again"] and not waiting["copies"] and waiting["spread_note"] == ""


def test_the_first_goes_outside_and_what_it_got_is_what_others_take() -> None:
    hosts = {"h1": host("h1"), "h2": host("h2")}
    first = plan_of("h1", hosts, ARGUMENTS, True)
    assert first["copies"] and first["source"] == "" and "from https://hub" in first["msg"]
    assert not plan_of("h2", hosts, ARGUMENTS, True)["copies"]
    hosts["h1"] = host("h1", "", attempt("", report("x")))
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
    hosts = {"h1": host("h1", "", attempt("", report("x")), looked=2.0), "h2": host("h2", looked=2.0)}
    assert not plan_of("h2", hosts, ARGUMENTS, True)["copies"] and plan_of("h1", hosts, ARGUMENTS, True)["source"] == ""


def test_hosts_with_another_version_serve_nobody_and_are_named() -> None:
    hosts = {"h1": host("h1", "x"), "h2": host("h2", "y"), "h3": host("h3")}
    plan = plan_of("h3", hosts, ARGUMENTS, True)
    assert plan["copies"] and plan["source"] == ""
    assert plan["warnings"] == ["org/model@main: another version is on h1, h2, and is not passed on"]
    hosts["h3"] = host("h3", "", attempt("", report("y")))
    hosts["h4"] = host("h4")
    plan = plan_of("h4", hosts, ARGUMENTS, True)
    assert plan["source"] in ("h2", "h3") and "another version is on h1," in plan["warnings"][0]


def test_hosts_that_want_something_else_are_left_out() -> None:
    hosts = {"h1": host("h1", "x", identity="other"), "h2": host("h2")}
    assert plan_of("h2", hosts, ARGUMENTS, True)["source"] == ""


def test_a_host_outside_the_play_serves() -> None:
    hosts = {"h2": {**host("h2", origin=NONE), "visit": {"spread": report("x")}}, "h3": host("h3", origin=NONE)}
    plans = [plan_of(name, hosts, ARGUMENTS | {"preferred": "h9"}, True) for name in hosts]
    assert [(each["source"], each["address"]) for each in plans] == [("h9", "10.9.9.9")] * 2


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


def test_a_host_that_copied_decides_no_hash_of_the_next_host() -> None:
    """It went through h1, and now claims to have the same while it states hashes of its own."""
    evil = report("evil") | {"key": "x", "name": "h1"}
    hosts = {
        "h0": host("h0", "", attempt("h1", evil)),
        "h1": host("h1", "", attempt("", report("x"))),
        "h2": host("h2"),
    }
    plan = plan_of("h2", hosts, ARGUMENTS, True)
    assert (plan["source"], plan["content"]) == ("h1", content("x")) and "another version is on h0" in plan["warnings"][
        0
    ]
    # One with another size agrees on nothing, either.
    evil = report("x")
    evil["content"]["files"][0][1] = 1 << 40
    hosts = {"h0": {**host("h0", "x"), "look": {"spread": evil}}, "h1": host("h1", "x"), "h2": host("h2")}
    assert plan_of("h2", hosts, ARGUMENTS, True)["source"] == ""


def test_the_first_from_outside_decides_and_its_content_is_given_whatever_the_source() -> None:
    renamed = report("x")
    renamed["content"]["commit"] = "e" * 40
    hosts = {
        "h0": host("h0", "", attempt("h1", renamed)), "h1": host("h1", "", attempt("", report("x"))), "h2": host("h2"),
    }  # fmt: skip
    plans = [
        plan_of("h2", {**hosts, "h2": host("h2", "", *tried)}, ARGUMENTS, True) for tried in ((), (attempt("h0"),))
    ]
    assert {each["source"] for each in plans} == {"h0", "h1"} and [each["content"] for each in plans] == [
        content("x")
    ] * 2
    late = attempt("", report("evil")) | {"round": 5}
    assert plan_of("h2", {**hosts, "h0": host("h0", "", late)}, ARGUMENTS, True)["source"] == "h1"


def test_a_host_chooses_neither_its_name_nor_its_address() -> None:
    """Root would work on the operator's machine, to which the host can point."""
    claims = {"name": "localhost", "address": "10.6.6.6", "user": "root", "folder": "/etc", "port": 1, "origin": "own"}
    hosts = {"h1": host("h1", "x"), "h2": host("h2")}
    hosts["h1"]["look"]["spread"].update(claims)
    plan = plan_of("h2", hosts, ARGUMENTS, True)
    assert [plan[name] for name in ("source", "address", "port", "user", "folder")] == [
        "h1",
        "10.0.0.1",
        22,
        "ops",
        "/blobs",
    ]
    hosts = {"h1": host("h1"), "h2": host("h2", "x")}
    hosts["h1"]["look"]["spread"].update(claims)
    assert plan_of("h1", hosts, ARGUMENTS, True)["source"] == "h2"


BAD: list[Any] = [
    "x", {}, {"holds": True}, report("x") | {"holds": "yes"}, report("x") | {"looked": math.nan},
    report("x") | {"content": {"files": 3}}, report("x") | {"content": {"commit": "../x", "files": []}},
    report("x") | {"content": {"id": "ubuntu:24.04", "inputs": "m", "source": "build"}}, report("x") | {"identity": 7},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_report_of_nonsense_stops_its_own_host_only(bad: Any) -> None:
    hosts = {"h1": {**host("h1"), "look": {"spread": bad}}, "h2": host("h2", "x"), "h3": host("h3")}
    plan = plan_of("h3", hosts, ARGUMENTS, True)
    assert plan["source"] == "h2" and [each for each in plan["warnings"] if "h1 is left out" in each] == (
        plan["warnings"] if bad else []
    )
    stopped = plan_of("h1", hosts, ARGUMENTS, True)
    assert not stopped["again"] and "where:    h1" in stopped["msg"]
    # As the answer of a copy it counts as a failure, for which the source is not blamed.
    hosts["h1"] = host("h1", "", attempt("h2", bad or "x"), attempt("h2", bad or "x"))
    assert plan_of("h3", hosts, ARGUMENTS, True)["source"] == "h2"
    assert "h1" not in plan_of("h1", hosts, ARGUMENTS, True)["source"]


def test_a_copy_that_ended_without_the_files_does_not_go_on_for_ever() -> None:
    hosts = {"h1": host("h1", "x"), "h2": host("h2", "", attempt("h1", report("")), attempt("", report("")))}
    assert not plan_of("h2", hosts, ARGUMENTS, True)["again"]


def test_an_image_is_told_by_its_id_and_the_inputs_that_this_host_wants() -> None:
    image = {"id": "sha256:" + "a" * 64, "inputs": "m", "source": "build"}
    hosts = {"h1": host("h1"), "h2": host("h2")}
    hosts["h1"]["look"]["spread"] = report("x") | {"content": image | {"more": 1}}
    assert plan_of("h2", hosts, ARGUMENTS, True)["content"] == image
    hosts["h1"]["look"]["spread"]["content"]["inputs"] = "other"
    assert plan_of("h2", hosts, ARGUMENTS, True)["source"] == ""

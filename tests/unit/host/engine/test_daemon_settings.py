"""Merging into daemon.json: what is the host's stays the host's, and what is the kit's can be taken back."""

import copy
import itertools

import pytest
from ansible.module_utils.mixtral_run_host.engine.daemon_settings import merge, needs

FOREIGN = {"dns": ["10.0.0.1"], "log-opts": {"labels": "team"}, "runtimes": {"kata": {"path": "kata"}}, "debug": True}
WANTED = {
    "log-driver": "json-file",
    "log-opts": {"max-size": "100m"},
    "runtimes": {"nvidia": {"path": "nvidia-container-runtime", "args": []}},
    "registry-mirrors": ["https://mirror"],
}


def test_merge_keeps_foreign_keys_and_absent_restores_the_file_exactly() -> None:
    merged, owned = merge(FOREIGN, WANTED, [])
    assert merged["dns"] == ["10.0.0.1"] and merged["runtimes"]["kata"] == {"path": "kata"}
    assert merged["log-opts"] == {"labels": "team", "max-size": "100m"}
    assert merged["runtimes"]["nvidia"] == {"path": "nvidia-container-runtime", "args": []}
    restored, left = merge(merged, {}, owned)
    assert restored == FOREIGN and left == []


def test_second_merge_changes_nothing() -> None:
    merged, owned = merge(FOREIGN, WANTED, [])
    assert merge(merged, WANTED, owned) == (merged, owned)


def test_arguments_are_not_changed() -> None:
    current, wanted = copy.deepcopy(FOREIGN), copy.deepcopy(WANTED)
    merge(current, wanted, [])
    assert current == FOREIGN and wanted == WANTED


def test_a_value_that_the_kit_replaced_comes_back() -> None:
    merged, owned = merge({"log-driver": "syslog"}, {"log-driver": "json-file"}, [])
    assert merged == {"log-driver": "json-file"}
    merged, owned = merge(merged, {"log-driver": "local"}, owned)
    assert merge(merged, {}, owned)[0] == {"log-driver": "syslog"}


def test_a_value_that_the_host_already_had_stays_the_hosts() -> None:
    merged, owned = merge({"live-restore": True}, {"live-restore": True}, [])
    assert owned == [] and merge(merged, {}, owned)[0] == {"live-restore": True}


def test_true_is_not_taken_for_one() -> None:
    assert merge({"max-concurrent-downloads": True}, {"max-concurrent-downloads": 1}, [])[0] == {
        "max-concurrent-downloads": 1
    }


def test_a_value_edited_by_hand_is_left_when_the_kit_no_longer_wants_it() -> None:
    merged, owned = merge({}, {"log-driver": "json-file"}, [])
    merged["log-driver"] = "journald"
    assert merge(merged, {}, owned)[0] == {"log-driver": "journald"}


def test_list_items_of_others_survive_a_change_of_ours() -> None:
    merged, owned = merge(
        {"registry-mirrors": ["https://theirs"]}, {"registry-mirrors": ["https://a", "https://b"]}, []
    )
    assert merged == {"registry-mirrors": ["https://theirs", "https://a", "https://b"]}
    merged, owned = merge(merged, {"registry-mirrors": ["https://b", "https://c"]}, owned)
    assert merged == {"registry-mirrors": ["https://theirs", "https://b", "https://c"]}
    assert merge(merged, {}, owned)[0] == {"registry-mirrors": ["https://theirs"]}


def test_settings_that_are_no_longer_wanted_are_taken_back_alone() -> None:
    merged, owned = merge(FOREIGN, WANTED, [])
    smaller = {"log-driver": "json-file"}
    merged, owned = merge(merged, smaller, owned)
    assert merged == {**FOREIGN, **smaller}
    assert [entry["path"] for entry in owned] == [["log-driver"]]


def test_two_sections_take_back_only_their_own_in_any_order() -> None:
    first, second = {"log-opts": {"max-size": "1m"}, "data-root": "/a"}, {"runtimes": {"nvidia": {"path": "n"}}}
    for order in itertools.permutations((first, second)):
        current, owned = dict(FOREIGN), []
        for wanted in order:
            current, mine = merge(current, wanted, [])
            owned.append(mine)
        for mine in owned:
            current = merge(current, {}, mine)[0]
        assert current == FOREIGN


def test_a_value_where_an_object_is_wanted_is_replaced_whole() -> None:
    merged, _ = merge({"log-opts": "odd"}, {"log-opts": {"max-size": "1m"}}, [])
    assert merged == {"log-opts": {"max-size": "1m"}}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, "none"),
        ({}, {"runtimes": {"nvidia": {"path": "n"}}}, "reload"),
        ({"live-restore": True}, {"live-restore": False, "debug": True}, "reload"),
        ({}, {"data-root": "/a"}, "restart"),
        ({"log-driver": "local"}, {"runtimes": {}}, "restart"),
        ({}, {"features": {"containerd-snapshotter": True}}, "restart"),
    ],
)
def test_what_a_change_asks_of_the_engine(before: dict, after: dict, expected: str) -> None:
    assert needs(before, after)[0] == expected

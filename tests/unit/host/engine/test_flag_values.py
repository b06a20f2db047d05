"""Flags of dockerd against settings: the same value, another one, and what a default adds to the host's own."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host.engine import engine_flags


@pytest.mark.parametrize(
    ("value", "texts", "same"),
    [
        (True, ["true"], True),
        (True, ["TRUE"], True),
        (True, ["false"], False),
        (False, ["true"], False),
        (False, ["true", "False"], True),
        (["a", "b"], ["b", "a", "c"], True),
        (["a", "d"], ["b", "a", "c"], False),
        ([1], ["1"], True),
        ({"a": 1, "b": "x"}, ["b=x", "a=1"], True),
        ({"a": 1, "b": "x"}, ["b=x"], False),
        ("x", ["y", "x"], True),
        ("x", ["x", "y"], False),
        (5, ["5"], True),
        (5, ["50"], False),
    ],
)
def test_a_flag_that_says_the_same(value: Any, texts: list[str], same: bool) -> None:
    assert engine_flags._is_given(value, texts) is same


@pytest.mark.parametrize(
    ("below", "above", "both"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}, {"a": {"b": 3, "c": 2}, "d": 4}),
        ({"a": 1}, 5, 5),
        (5, {"a": 1}, {"a": 1}),
        ({"a": {"b": 1}}, {"a": 3}, {"a": 3}),
    ],
)
def test_what_lies_below(below: Any, above: Any, both: Any) -> None:
    assert engine_flags._overlaid(below, above) == both


def test_paths_and_values() -> None:
    assert engine_flags._paths({"a": {"b": 1, "c": {}}, "d": 2}, ("x",)) == [
        ("x", "a", "b"),
        ("x", "a", "c"),
        ("x", "d"),
    ]
    assert engine_flags._paths({}, ("x",)) == [("x",)] and engine_flags._paths(3, ()) == [()]
    settings = {"a": {"b": 1}, "c": 2}
    assert [engine_flags._at(settings, each) for each in ((), ("a", "b"), ("a", "x"), ("c", "b"), ("x",))] == [
        settings, 1, None, None, None,
    ]  # fmt: skip
    mine = {("a",): {"before": 7}, ("b",): {}}
    current = {"a": 1, "b": 2, "c": 3}
    assert [engine_flags._foreign(current, (name,), mine) for name in "abcd"] == [7, None, 3, None]
    kept: list[str] = []
    default = {"a": 1, "b": {"x": 1, "y": 2}, "c": {}, "d": 4}
    missing = engine_flags._missing(default, {"k": {"a": 5, "b": {"x": 1}}}, ("k",), {}, kept)
    assert missing == {"b": {"y": 2}, "c": {}, "d": 4} and kept == ["k.a 5"]
    assert engine_flags._missing({"a": 1}, {"k": {"a": 1}}, ("k",), {}, kept) is None and len(kept) == 1
    for other in ("x", 3, 2.5, [], False):
        kept.clear()
        assert engine_flags._missing({"a": 1}, {"k": other}, ("k",), {}, kept) is None and len(kept) == 1

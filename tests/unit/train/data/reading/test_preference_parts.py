"""Pairs of answers: where they begin to differ, what agrees with a prompt, and which problem a record has."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_run.train.data.reading import preferences
from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.reading.preferences import convert_preference

S, U, A = "system", "user", "assistant"


def turns(text: str) -> list[Message]:
    """Messages by their contents: a capital letter is the assistant's, a digit the system's."""
    return [Message(A if each.isupper() else S if each.isdigit() else U, each) for each in text]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("aB", "aC", "a"),
        ("aBcD", "aXcD", "a"),
        ("aBcD", "aBcE", "aBc"),
        ("aB", "aB", "a"),
        ("aB", "aBcD", "a"),
        ("aBcD", "aB", "a"),
        ("1aB", "1aC", "1a"),
        ("aB", "xB", ""),
        ("aBCD", "aBCD", "a"),
    ],
)
def test_the_prompt_is_what_both_begin_with(chosen: str, rejected: str, prompt: str) -> None:
    found = preferences._split(turns(chosen), turns(rejected))
    contents = ["".join(each.content for each in part) for part in found]
    assert contents == [prompt, chosen[len(prompt) :], rejected[len(prompt) :]]
    assert not any(each.learned for each in found[0])


@pytest.mark.parametrize(
    ("given", "agrees"),
    [
        (" a ", True), ("b", False), ("B", False), (None, False), (3, False),
        ([{"role": U, "content": "a"}], True), ([{"role": U, "content": "x"}], False), ([], False),
    ],
)  # fmt: skip
def test_a_prompt_that_says_the_same(given: object, agrees: bool) -> None:
    assert preferences._agrees(given, turns("a")) is agrees
    assert (
        preferences._is_whole(turns("aB"))
        and preferences._is_whole(turns("1a"))
        and not preferences._is_whole(turns("B"))
    )


@pytest.mark.parametrize(
    ("record", "allowed", "problem"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs", None),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "pairs", "'chosen' and 'rejected' are the same answer"),
        ({"prompt": "a", "chosen": "b"}, "pairs", "'rejected' is missing; the keys are 'chosen', 'prompt'"),
        ({"chosen": "b", "rejected": "c"}, "pairs", "'prompt' is missing: 'chosen' and 'rejected' do not show"),
        ({"prompt": "a", "completion": "b", "label": True}, "pairs", "has one answer with a 'label', which"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired", None),
        ({"prompt": "a", "completion": "b", "label": "x"}, "unpaired", "'label': expected true or false; found x"),
        ({"prompt": "a", "completion": "b", "label": [1]}, "unpaired", "'label': expected true or false; found a list"),
        ({"prompt": "a", "completion": "b"}, "unpaired", "'label' is missing"),
        ({"label": True}, "unpaired", "'prompt' and 'completion' are missing"),
        ({"prompt": "a", "label": True}, "unpaired", "'completion' is missing"),
        ({"x": 1}, "pairs", "expected the keys 'prompt', 'chosen' and 'rejected'; found 'x'; --field"),
        ({"x": 1}, "unpaired", "expected the keys 'prompt', 'chosen' and 'rejected', or 'prompt', 'completion' and"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": 1}, "unpaired",
         "the keys fit pairs and unpaired answers"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": 1}, "pairs", None),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "pairs", "'chosen' is empty"),
        ({"chosen": [{"role": U, "content": "a"}], "rejected": "c"}, "pairs", "one of 'chosen' and 'rejected' begins"),
    ],
)  # fmt: skip
def test_what_a_record_lacks(record: dict[str, Any], allowed: str, problem: str | None) -> None:
    found = convert_preference(record, allowed, "auto", {})
    if problem is None:
        assert found.problems == []
    else:
        assert len(found.problems) == 1 and found.problems[0].startswith(problem), found.problems


@pytest.mark.parametrize(("label", "answers"), [(True, (0, None)), (False, (None, 0)), (None, None)])
def test_answers_of_an_example(label: bool | None, answers: Any) -> None:
    """A good answer stands in the place of the chosen one, a bad one in that of the rejected one."""
    example = Example("p", tuple(turns("aB")), label=label)
    found = example.answers()
    if answers is None:
        assert len(found) == 1 and found[0] is not None and found[0].messages == example.messages
    else:
        assert [each is not None for each in found] == [each is not None for each in answers]
    pair = Example("p", tuple(turns("aB")), rejected=tuple(turns("aC")))
    chosen, rejected = pair.answers()
    assert chosen is not None and rejected is not None
    assert (chosen.messages, rejected.messages) == (tuple(turns("aB")), tuple(turns("aC")))


def test_keys_of_half_a_pair_and_half_a_single_answer_are_a_pair() -> None:
    found = convert_preference({"prompt": "a", "chosen": "b", "label": True}, "unpaired")
    assert found.shape == "pairs"
    assert found.problems == ["'rejected' is missing; the keys are 'chosen', 'label', 'prompt'"]

"""Records of preferences in TRL's shapes, and what is wrong with those that cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.data import CheckConfig
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.check.check import check_data
from mixtral_run.train.data.check.check_encoding import load_encoding
from mixtral_run.train.data.check.check_screen import check_lines
from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, USER, Message
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.reading.preferences import convert_preference
from mixtral_run.train.data.reading.shapes import convert
from mixtral_run.train.data.templates.encoding import content_digest


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


Q, YES, NO = (Message(USER, "Q?", learned=False), Message(ASSISTANT, "yes"), Message(ASSISTANT, "no"))
PAIRS: list[dict[str, Any]] = [
    {"prompt": "Q?", "chosen": "yes", "rejected": "no"},
    {"prompt": [user("Q?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    {"prompt": [user("Q?")], "chosen": "yes", "rejected": [assistant("no")]},
    {"chosen": [user("Q?"), assistant("yes")], "rejected": [user("Q?"), assistant("no")]},
    {"prompt": "Q?", "chosen": [user("Q?"), assistant("yes")], "rejected": [user("Q?"), assistant("no")]},
    {"prompt": [user("Q?")], "chosen": [user("Q?"), assistant("yes")], "rejected": [user("Q?"), assistant("no")]},
]


@pytest.mark.parametrize("record", PAIRS)
def test_pairs_in_all_forms_are_the_same(record: dict[str, Any]) -> None:
    for allowed in ("pairs", "unpaired"):
        found = convert_preference(record, allowed)
        assert not found.problems and not found.unused
        assert (found.messages, found.rejected, found.label) == ((Q, YES), (Q, NO), None)


def test_turns_before_the_answer_belong_to_the_prompt_and_are_not_learned() -> None:
    before = [user("a"), assistant("b"), user("Q?")]
    prompt = (Message(USER, "a", learned=False), Message(ASSISTANT, "b", learned=False), Q)
    for record in (
        {"chosen": [*before, assistant("yes")], "rejected": [*before, assistant("no")]},
        {"prompt": before, "chosen": "yes", "rejected": "no"},
    ):
        found = convert_preference(record, "pairs")
        assert (found.messages, found.rejected) == ((*prompt, YES), (*prompt, NO))
    with_system = convert_preference({"system": "S", **PAIRS[0]}, "pairs")
    assert with_system.messages == (Message(SYSTEM, "S", learned=False), Q, YES)


@pytest.mark.parametrize(("label", "expected"), [(True, True), (False, False), (1, True), (0, False), ("False", False)])
def test_single_answers_have_a_label(label: Any, expected: bool) -> None:
    for prompt, completion in (("Q?", "yes"), ([user("Q?")], [assistant("yes")])):
        found = convert_preference({"prompt": prompt, "completion": completion, "label": label}, "unpaired")
        assert not found.problems and (found.messages, found.label) == ((Q, YES), expected)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "Q?", "chosen": "yes"}, "pairs", "'rejected' is missing; the keys are 'chosen', 'prompt'"),
    ({"prompt": "Q?", "response": "x"}, "pairs", "expected the keys 'prompt', 'chosen' and 'rejected'; found"),
    ({"prompt": "Q?", "completion": "x"}, "unpaired", "'label' is missing"),
    ({"chosen": "yes", "rejected": "no"}, "pairs", "'prompt' is missing: 'chosen' and 'rejected' do not show where"),
    ({"prompt": "Q?", "chosen": "same", "rejected": " same "}, "pairs", "'chosen' and 'rejected' are the same answer"),
    ({"chosen": PAIRS[3]["chosen"], "rejected": PAIRS[3]["chosen"]}, "pairs", "are the same answer"),
    ({"prompt": "Q?", "chosen": "", "rejected": "no"}, "pairs", "'chosen' is empty"),
    ({"prompt": "Q?", "chosen": [], "rejected": "no"}, "pairs", "'chosen' is empty"),
    (
        {"prompt": "Q?", "chosen": [assistant(" ")], "rejected": "no"},
        "pairs",
        "'chosen': message 1: 'content' is empty",
    ),
    ({"prompt": "Q?", "chosen": 3, "rejected": "no"}, "pairs", "'chosen': expected text; found a number"),
    ({"prompt": " ", "chosen": "yes", "rejected": "no"}, "pairs", "'prompt' is empty"),
    ({"prompt": [user("Q?"), assistant("w")], "chosen": "yes", "rejected": "no"}, "pairs", "expected the user and"),
    (
        {"chosen": PAIRS[3]["chosen"], "rejected": "no"},
        "pairs",
        "one of 'chosen' and 'rejected' begins with the prompt",
    ),
    ({"chosen": [user("Q?")], "rejected": [user("Q?"), assistant("no")]}, "pairs", "with an answer of the assistant"),
    ({"prompt": "Q?", "completion": "x", "label": True}, "pairs", "which --method kto learns from"),
    ({"prompt": "Q?", "completion": "x", "label": 0.5}, "unpaired", "'label': expected true or false; found a number"),
    ({"prompt": "Q?", "completion": "x", "label": "good"}, "unpaired", "'label': expected true or false; found good"),
    ({**PAIRS[0], "completion": "x", "label": True}, "unpaired", "--data-format pairs|unpaired chooses"),
    ({"completion": "x"}, "unpaired", "'prompt' and 'label' are missing; the keys are 'completion'"),
    ({"label": True}, "unpaired", "'prompt' and 'completion' are missing; the keys are 'label'"),
    ({"chosen": "yes"}, "pairs", "'prompt' and 'rejected' are missing; the keys are 'chosen'"),
    ({"chosen": PAIRS[3]["chosen"]}, "pairs", "'rejected' is missing; the keys are 'chosen'"),
    ({"chosen": "", "rejected": "no"}, "pairs", "'prompt' is missing: 'chosen' and 'rejected' do not show where"),
    ({"prompt": " ", "chosen": "", "rejected": "no"}, "pairs", "'prompt' is empty"),
]


@pytest.mark.parametrize(("record", "allowed", "problem"), BAD)
def test_records_that_cannot_be_used_say_why(record: dict[str, Any], allowed: str, problem: str) -> None:
    found = convert_preference(record, allowed)
    assert any(problem in each for each in found.problems), found.problems


def test_keys_that_are_not_used_are_counted() -> None:
    found = convert_preference({**PAIRS[4], "prompt": "another", "score": 3}, "pairs")
    assert found.unused == {"prompt", "score"} and not found.problems
    renamed = convert_preference(
        {"q": "Q?", "chosen": "yes", "bad": "no"}, "pairs", "auto", {"prompt": "q", "rejected": "bad"}
    )
    assert (renamed.messages, renamed.rejected, renamed.unused) == ((Q, YES), (Q, NO), set())


def test_all_problems_of_a_file_are_in_one_error(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    records = [PAIRS[0], *(record for record, allowed, _ in BAD[:7] if allowed == "pairs")]
    file.write_text("".join(json.dumps(each) + "\n" for each in records) + "{broken\n")
    with pytest.raises(ConfigError) as caught:
        read_examples([str(file)], ReadOptions(preferences="pairs")).check()
    assert [each.partition(":")[0] for each in caught.value.problems] == [f"line {n}" for n in (2, 3, 4, 5, 6, 7, 8)]
    assert "7 of 8 examples" in str(caught.value.found) and '"chosen": "56"' in str(caught.value.expected)
    assert caught.value.next_command == "correct them, or --skip-bad-examples to leave them out"
    # Where nothing would be left, leaving them out is no way on.
    useless = tmp_path / "useless.jsonl"
    useless.write_text("{broken\n")
    with pytest.raises(ConfigError) as none_left:
        read_examples([str(useless)], ReadOptions(preferences="pairs")).check()
    assert none_left.value.next_command == "correct them"
    stream = read_examples([str(file)], ReadOptions(preferences="pairs", skip_bad_examples=True))
    (example,) = stream
    assert [part.messages for part in example.answers() if part is not None] == [(Q, YES), (Q, NO)]
    assert "7 examples left out" in stream.remarks()[0]


def test_finetune_names_align_for_pairs() -> None:
    (problem,) = convert(PAIRS[0]).problems
    assert "mixtral-run align learns from 'chosen' and 'rejected'" in problem


def test_every_part_of_a_preference_counts_in_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    variants = [PAIRS[0], {**PAIRS[0], "rejected": "never"}, {"prompt": "Q?", "completion": "yes", "label": True}]
    variants += [{"prompt": "Q?", "completion": "yes", "label": False}]
    file.write_text("".join(json.dumps(each) + "\n" for each in variants))
    examples = list(read_examples([str(file)], ReadOptions(preferences="unpaired")))
    assert len({content_digest(each) for each in examples}) == 4


def test_a_check_shows_both_answers_and_what_is_too_long(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    records = [
        PAIRS[0],
        PAIRS[0],
        {**PAIRS[0], "rejected": "never"},
        {**PAIRS[0], "chosen": "y " * 90},
        {"prompt": "x"},
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in records))
    config = CheckConfig(data_path=(str(file),), method="dpo", seq_length=64)
    result = check_data(config, load_encoding(tiny_tokenizer_folder, "mixtral"))
    assert (result.num_examples, result.num_duplicates, result.num_bad, result.num_too_long) == (3, 1, 2, 1)
    assert result.counts_by_shape == {"pairs": 4} and result.problems[1].startswith("line 5: expected the keys")
    shown = "\n".join(check_lines(result, color=False))
    assert "line 1, chosen:\n‹<s>›[INST] Q? [/INST]⟦ yes‹</s>›⟧" in shown
    assert "line 1, rejected:\n‹<s>›[INST] Q? [/INST]⟦ no‹</s>›⟧" in shown
    assert "1 answer is longer than --seq-length 64, which align refuses" in shown
    advised = re.search(r"next: mixtral-run align --method dpo --seq-length (\d+)", shown)
    assert advised is not None and result.lengths is not None
    assert result.lengths.longest - 1 <= int(advised[1]) < result.lengths.longest + 63

"""The shipped examples, which a rehearsal trains on."""

import json

from mixtral_run.trial.sizes import INSTRUCTIONS
from tests.support.examples import examples_of, turns_of


def test_they_pass_the_check_every_data_file_passes() -> None:
    assert 195 <= len(examples_of(INSTRUCTIONS)) <= 215


def test_each_line_is_one_example_without_stray_keys_or_space() -> None:
    for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        assert list(example) == ["instruction", "response"]
        for text in example.values():
            assert text == text.strip() != ""
            assert "  " not in text.replace("\n    ", "\n")


def test_no_example_occurs_twice() -> None:
    turns = [turns_of(example)[0] for example in examples_of(INSTRUCTIONS)]
    assert len({instruction.casefold() for instruction, _ in turns}) == len(turns)
    assert len({response.casefold() for _, response in turns}) == len(turns)


def test_lengths_are_varied_and_the_shortest_answers_come_first() -> None:
    words = [len(turns_of(example)[0][1].split()) for example in examples_of(INSTRUCTIONS)]
    assert max(words[:16]) <= 5
    assert sum(8 <= count <= 60 for count in words) > 0.8 * len(words)
    assert max(words) <= 60

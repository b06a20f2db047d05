"""The shipped examples, which a rehearsal trains on."""

import json

from mixtral_run.resources import INSTRUCTIONS
from mixtral_run.train.data.examples import read_examples


def test_they_pass_the_check_every_data_file_passes() -> None:
    assert 195 <= len(read_examples(INSTRUCTIONS)) <= 215


def test_each_line_is_one_example_without_stray_keys_or_space() -> None:
    for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        assert list(example) == ["instruction", "response"]
        for text in example.values():
            assert text == text.strip() != ""
            assert "  " not in text.replace("\n    ", "\n")


def test_no_example_occurs_twice() -> None:
    examples = read_examples(INSTRUCTIONS)
    assert len({example.instruction.casefold() for example in examples}) == len(examples)
    assert len({example.response.casefold() for example in examples}) == len(examples)


def test_lengths_are_varied_and_the_shortest_answers_come_first() -> None:
    words = [len(example.response.split()) for example in read_examples(INSTRUCTIONS)]
    assert max(words[:16]) <= 5
    assert sum(8 <= count <= 60 for count in words) > 0.8 * len(words)
    assert max(words) <= 60

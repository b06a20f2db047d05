"""The limit of nested JSON does not depend on which program reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.reading.json_values import MOST_LEVELS, TOO_DEEP, read_json


def nested(levels: int) -> str:
    """A list of lists, and an object in its middle."""
    return (
        "[" * (levels // 2)
        + '{"a": ' * (levels - levels // 2)
        + "1"
        + "}" * (levels - levels // 2)
        + "]" * (levels // 2)
    )


def deeper(frames: int, job: Callable[[], Any]) -> Any:
    return job() if not frames else deeper(frames - 1, job)


@pytest.mark.parametrize("frames", [0, 350])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_of_many_levels_is_refused_wherever_it_is_read(tmp_path: Path, name: str, frames: int) -> None:
    rows = [f'{{"text": "x", "more": {nested(levels)}}}' for levels in (MOST_LEVELS - 1, MOST_LEVELS, 450)]
    wide = json.dumps({"text": "[" * 500, "more": [[{}] * 300] * 3})
    text = "\n".join([*rows, wide]) if name == "a.jsonl" else f"[{', '.join([*rows, wide])}]"
    (tmp_path / name).write_text(text)

    def read() -> tuple[list[str], list[str]]:
        stream = read_examples([str(tmp_path / name)], ReadOptions(skip_bad_examples=True))
        return [example.place for example in stream], stream.problems.first

    places, problems = deeper(frames, read)
    numbers = [place.split()[1] for place in places]
    assert numbers == ["1", "4"]
    assert [problem.partition(": ")[2] for problem in problems] == [TOO_DEEP, TOO_DEEP]


def test_a_text_of_json_within_a_record_has_the_same_limit() -> None:
    assert read_json(nested(MOST_LEVELS)) and read_json('"[[["') == "[[["
    for levels in (MOST_LEVELS + 1, 900, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            read_json(nested(levels))

"""--valid-fraction: duplicates on one side, the same side in every file and order, about the asked share."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.examples import read_examples
from mixtral_run.train.data.split import split_by_digest
from mixtral_run.train.data.templates.encoding import content_digest


def digests_of(path: Path, lines: list[dict[str, object]]) -> dict[str, int]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {example.messages[0].content: content_digest(example) for example in read_examples([str(path)])}


def test_the_content_alone_decides(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"instruction": f"Say {n}.", "response": str(n)} for n in range(400)]
    first = digests_of(tmp_path / "a.jsonl", lines)
    # Another file, another order, other keys beside and blanks around the texts.
    shuffled = [{**line, "response": f" {line['response']}\n", "source": "x"} for line in lines[::2]]
    random.Random(1).shuffle(shuffled)
    second = digests_of(tmp_path / "b.jsonl", shuffled)
    assert second == {name: first[name] for name in second}
    assert len(set(first.values())) == 400
    # A conversation of the same texts is the same content; another answer is not.
    messages = [{"role": "user", "content": "Say 7."}, {"role": "assistant", "content": "7"}]
    assert digests_of(tmp_path / "c.jsonl", [{"messages": messages}]) == {"Say 7.": first["Say 7."]}
    other = digests_of(tmp_path / "d.jsonl", [{"instruction": "Say 7.", "response": "eight"}])
    assert other["Say 7."] != first["Say 7."]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_about_the_asked_one(fraction: float) -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    training, validation = split_by_digest(digests, fraction, "data")
    assert abs(len(validation) / 20_000 - fraction) < 0.01
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(20_000))
    # What a smaller fraction holds back, a larger one holds back too.
    _, more = split_by_digest(digests, min(fraction * 1.1, 0.999), "data")
    assert set(validation.tolist()) <= set(more.tolist())
    assert digests[validation].max() < digests[training].min()


def test_duplicates_are_on_one_side() -> None:
    digests = np.repeat(np.random.default_rng(1).integers(0, 2**64, 50, dtype=np.uint64), 4)
    training, validation = split_by_digest(digests, 0.3, "data")
    assert not set(digests[training].tolist()) & set(digests[validation].tolist())


@pytest.mark.parametrize(
    ("digests", "side", "words"),
    [([2**64 - 1, 2**63], "validation", "a larger"), ([1, 2], "training", "a smaller")],
)
def test_a_side_without_examples_is_refused(digests: list[int], side: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"leaves no example for {side}") as caught:
        split_by_digest(np.asarray(digests, np.uint64), 0.1, "--data-path x.jsonl")
    assert f"{words} --valid-fraction" in str(caught.value) and "--data-path x.jsonl" in str(caught.value)

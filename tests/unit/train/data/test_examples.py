"""The stream of examples: several sources, all problems at once, what is left out and not used, and wrong data."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.data import CheckConfig, DataConfig
from mixtral_run.config.data_sources import DataSource, combined_sha256, content_sha256, parse_source, source_problems
from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.train.data.mixture import describe_mixture, mixed_indices
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.reading.stdin_copy import with_stdin_copied
from tests.support.examples import conversation, examples_of, turns_of
from tests.support.samples import samples_of

GOOD = '{"instruction": "a", "response": "b"}'
SKIP = ReadOptions(skip_bad_examples=True)


def refused(*paths: Path, options: ReadOptions | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_examples(map(str, paths), options).check()
    assert all(str(path) in str(caught.value) for path in paths)
    return caught.value


def test_errors_name_the_setting(tmp_path: Path) -> None:
    stream = read_examples([str(tmp_path / "missing.jsonl")], setting="valid_data_path")
    with pytest.raises(ConfigError) as caught:
        stream.check()
    assert caught.value.where == f"--valid-data-path {tmp_path / 'missing.jsonl'}"
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match="The validation data contain no"):
        read_examples([str(tmp_path / "empty.jsonl")], setting="valid_data_path").check()


def test_examples_know_their_place_and_one_file_may_mix_shapes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    chat = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    path.write_text(f"\ufeff{GOOD}\n\n{json.dumps(chat)}\n" + '{"text": "plain"}', "utf-8")
    stream = read_examples([str(path)])
    first, second, third = stream
    assert (first, second) == (conversation("a", "b"), conversation("c", "d", place="line 3"))
    assert (third.text, third.messages, third.place) == ("plain", (), "line 4")
    assert stream.counts_by_shape == {"instruction": 1, "messages": 1, "text": 1}
    assert stream.remarks() == []


def test_several_sources_are_read_in_order_and_named_in_places(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_text(GOOD * 1)
    two.write_text("prompt,completion\nc,d\ne,\n")
    stream = read_examples([str(one), f"{two}:3"], SKIP)
    assert [(each.place, turns_of(each)) for each in stream] == [
        ("line 1 of one.jsonl", [("a", "b")]), ("line 2 of two.csv", [("c", "d")])
    ]  # fmt: skip
    assert (stream.counts_by_source, [each.weight for each in stream.sources]) == ([1, 1], [None, 3.0])
    assert stream.problems.first == ["line 3 of two.csv: the keys fit no shape: 'prompt'; prompt needs 'completion'"]


def test_problems_of_all_files_are_reported_together(tmp_path: Path) -> None:
    one, two, three = tmp_path / "one.jsonl", tmp_path / "two.json", tmp_path / "none"
    one.write_text(f"{GOOD}\n{{\n")
    two.write_text("[{]")
    text = str(refused(one, two, three))
    for words in ("3 things", "two.json", "The JSON is broken", "No such file", "line 2 of one.jsonl: broken JSON"):
        assert words in text


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" * 10, "utf-8")
    assert len(refused(path).problems) == 10
    path.write_text("{\n" * 1500 + GOOD, "utf-8")
    error = refused(path)
    assert [problem.split(":")[0] for problem in error.problems[:10]] == [f"line {number}" for number in range(1, 11)]
    assert error.problems[10:] == ("and 1,490 more",)
    assert "1,500 of 1,501 examples" in str(error.found) and "--skip-bad-examples" in str(error.next_command)


def test_bad_examples_are_left_out_on_request_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n" + "{\n" * 12 + GOOD, "utf-8")
    stream = read_examples([str(path)], SKIP)
    assert len(list(stream)) == 2
    (remark,) = stream.remarks()
    assert remark.startswith("12 examples left out, as not usable: line 2: broken JSON")
    assert "line 11: " in remark and "line 12: " not in remark and "and 2 more" in remark
    path.write_text("{\n" * 3, "utf-8")
    error = refused(path, options=SKIP)
    assert "contain no usable example" in error.what and len(error.problems) == 3


def test_keys_that_are_not_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    user, assistant = {"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}
    lines = [{"instruction": "a", "response": "b", "category": "c"}] * 2
    lines += [{"messages": [user, assistant, user], "id": 1}, {"messages": [user, assistant], "id": None}]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    stream = read_examples([str(path)])
    stream.check()
    assert stream.unused_keys == {"category": 2, "id": 1, "messages: name": 2}
    unused, trimmed = stream.remarks()
    assert "'category' (2), 'messages: name' (2), 'id' (1)" in unused
    assert trimmed.startswith("1 conversation does not end with the assistant")


def test_half_of_a_surrogate_pair_has_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    line = '{"instruction":"cut \\ud83d here","response":"fine \\ud83d\\ude00 \\\\ud83d"}'
    path.write_text(f"{GOOD}\n{line}\n", "utf-8")
    column = line.index("\\ud83d here") + 1
    assert refused(path).problems == (
        f"line 2: 'instruction': half of a surrogate pair, \\ud83d, at character 5 (column {column} of the line)",
    )
    path.write_text(line.replace("fine", "\\udc00"), "utf-8")
    assert all("column" not in problem for problem in refused(path).problems)
    path.write_text(line.replace('"instruction"', '"note"').replace("response", "text"), "utf-8")
    assert len(examples_of(path)) == 1


def test_the_weight_of_an_answer_decides_what_the_loss_covers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5", "weight": 0},
        {"role": "user", "content": "No. Again."}, {"role": "assistant", "content": "4", "weight": 1},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.", "train": False},
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": messages}), "utf-8")
    row = samples_of(examples_of(path), tiny_tokenizer, 96).row(0)
    learned = [int(label) for label, counts in zip(row.labels, row.loss_mask, strict=True) if counts]
    assert tiny_tokenizer.decode(learned, skip_special_tokens=True).strip() == "4"


def test_indentation_and_plain_text_are_learned(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "f(x):", "response": "    return x + 1"}\n{"text": " All of it."}', "utf-8")
    samples = samples_of(examples_of(path), tiny_tokenizer, 96)
    for index, text in ((0, "     return x + 1</s>"), (1, " All of it.</s>")):
        row = samples.row(index)
        assert tiny_tokenizer.decode(row.labels[row.loss_mask == 1].tolist()) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", DataSource("a.jsonl", "a.jsonl")),
        ("a.jsonl:0.3", DataSource("a.jsonl:0.3", "a.jsonl", weight=0.3)),
        ("/x/y.parquet:2", DataSource("/x/y.parquet:2", "/x/y.parquet", weight=2.0)),
        ("-:.5", DataSource("-:.5", "-", weight=0.5)),
        ("o/n", DataSource("o/n", "o/n", True)),
        ("o/n@v1:test:2", DataSource("o/n@v1:test:2", "o/n@v1", True, None, "test", 2.0)),
        ("o/n:sub:train[:10%]", DataSource("o/n:sub:train[:10%]", "o/n", True, "sub", "train[:10%]")),
        ("data/my.jsonl", DataSource("data/my.jsonl", "data/my.jsonl")),
        ("data/my.jsonl.gz:1", DataSource("data/my.jsonl.gz:1", "data/my.jsonl.gz", weight=1.0)),
        ("a:b:c", DataSource("a:b:c", "a:b:c")),
    ],
)
def test_sources_are_spelled_with_split_and_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: DataSource
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source(text) == expected


def test_a_path_that_exists_is_taken_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl:2").touch()
    (tmp_path / "o/n").mkdir(parents=True)
    assert parse_source("a.jsonl:2").weight is None
    assert parse_source("o/n") == DataSource("o/n", "o/n")
    assert parse_source("o/n:test:2") == DataSource("o/n:test:2", "o/n", False, None, "test", 2.0)


def test_settings_of_data_are_checked_together() -> None:
    config = DataConfig(
        data_path=("a:1", "b", "c:0", "-:1", "-:1"), data_format="alpca", field=("x=y", "text=", "text=a", "text=b")
    )
    found = "\n".join(config.problems())
    for words in (
        "--data-format: expected one of auto, instruction", "--field: expected NAME=KEY", "found 'x=y'",
        "found 'text='", "--field text: expected once", "--data-path: expected a weight for every source or for none",
        "--data-path c:0: expected a weight above 0", "'-', the standard input, once",
    ):  # fmt: skip
        assert words in found, words
    assert source_problems("--valid-data-path", ["a:1"], weights=False)
    assert DataConfig.from_mapping({"data_path": "a.jsonl"}) == DataConfig(data_path=("a.jsonl",))
    assert CheckConfig().problems() == ["PATH is missing"]


def test_shares_are_those_of_the_weights_and_every_example_is_there() -> None:
    counts, weights = [10, 300, 7], [0.5, 0.3, 0.2]
    mixed = mixed_indices(counts, weights)
    assert mixed is not None
    found = mixed.tolist()
    borders = [0, 10, 310, 317]
    taken = [[i for i in found if low <= i < high] for low, high in itertools.pairwise(borders)]
    for indices, weight, count in zip(taken, weights, counts, strict=True):
        assert abs(len(indices) / len(found) - weight) < 0.002
        times = [indices.count(index) for index in set(indices)]
        assert len(times) == count and max(times) - min(times) <= 1
    assert mixed_indices([3, 4], [None, None]) is None
    even = mixed_indices([2, 2], [7, 7])
    assert even is not None and sorted(even.tolist()) == [0, 1, 2, 3]
    assert describe_mixture(["a", "b"], [10, 90], [1, 1]) == (
        "An epoch takes a: 10 examples, 50.0% of the samples, each 9.0 times; b: 90 examples, 50.0% of the samples, "
        "each 1.0 times"
    )
    with pytest.raises(ConfigError, match="the source number 2"):
        mixed_indices([3, 0], [1, 1])
    with pytest.raises(ConfigError, match="too far apart"):
        mixed_indices([10, 10**9], [0.99, 0.01])


def test_the_hash_of_data_is_that_of_the_file_or_of_all(tmp_path: Path) -> None:
    import hashlib

    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    sums = [hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b")]
    assert content_sha256([f"{tmp_path / 'a'}:2"]) == sums[0]
    assert content_sha256([str(tmp_path / "a"), str(tmp_path / "b")]) == combined_sha256(sums) != sums[0]
    assert content_sha256([str(tmp_path)]) == combined_sha256(sums)
    assert content_sha256([]) is content_sha256([str(tmp_path / "none")]) is content_sha256(["o/n"]) is None


def test_standard_input_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = GOOD.encode("utf-16")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    config = with_stdin_copied(DataConfig(data_path=("-:2",)))
    (text,) = config.data_path
    assert parse_source(text).weight == 2.0 and parse_source(text).path.read_bytes() == content
    assert [turns_of(each) for each in read_examples(config.data_path)] == [[("a", "b")]]
    assert read_examples(config.data_path).where == "--data-path - (standard input)"
    parse_source(text).path.unlink()
    assert with_stdin_copied(config) is config
    with pytest.raises(ConfigError, match="under torchrun"):
        with_stdin_copied(DataConfig(data_path=("-",)), is_worker=True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ConfigError, match="is a terminal"):
        with_stdin_copied(DataConfig(data_path=("-",)))


_TEXTS = ("", " ", "a", "user", "assistant", "system", "tool", "human", "gpt", "\ud83d", "é\x00", "[1]")
_KEYS = (
    "role", "from", "content", "value", "messages", "text", "tools", "tool_calls", "function", "name", "weight",
    "train", "instruction", "response", "output", "input", "prompt", "completion", "type", "arguments", "x",
)  # fmt: skip


def _value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return chance.choice(_TEXTS)
    if kind < 6:
        return chance.choice([None, True, False, 0, 1, -1, 0.5, 10**30, float("nan")])
    if kind == 6:
        return [_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(_KEYS): _value(chance, depth + 1) for _ in range(chance.randrange(5))}


@pytest.mark.parametrize("seed", range(4))
def test_no_record_and_no_bytes_end_in_another_error(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    good = [json.loads(GOOD), {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    path = tmp_path / "data"
    num_good = 0
    for _ in range(400):
        rows = [_value(chance) if chance.random() < 0.7 else dict(chance.choice(good)) for _ in range(6)]
        for row in rows:
            if isinstance(row, dict) and chance.random() < 0.3:
                row[chance.choice(["messages", "conversations", "text", "tools", "prompt"])] = _value(chance)
        whole = json.dumps(rows) if chance.random() < 0.5 else "\n".join(map(json.dumps, rows))
        content = bytearray(whole.encode(chance.choice(["utf-8", "utf-8", "utf-16"])))
        for _ in range(chance.choice([0, 0, 1, 5])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), len(content), chance.randrange(len(content))])])
        stream = read_examples([str(path)], SKIP)
        try:
            found = list(stream)
        except MixtralRunError as error:
            str(error).encode("utf-8", "backslashreplace")
            continue
        num_good += len(found)
        for example in found:
            assert (example.text is None) == bool(example.messages)
            for text in [example.text or "", *(message.content for message in example.messages)]:
                text.encode("utf-8")
            assert example.text or any(each.role == "assistant" and each.learned for each in example.messages)
            assert not example.messages or example.messages[-1].role == "assistant"
    assert num_good > 100


MEASURE = """
import resource, sys
from mixtral_run.train.data.reading.examples import read_examples
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream = read_examples(sys.argv[1:])
stream.check()
assert not {"torch", "pyarrow", "datasets", "numpy", "transformers"} & set(sys.modules)
print(sum(stream.counts_by_source), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_file_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """60 MB as lines, as a list and as a table: each takes a few MB. JSON and CSV need no package."""
    row = {"instruction": "a" * 900, "response": "b" * 600}
    line = json.dumps(row)
    count = 13_000
    (tmp_path / "lines.jsonl").write_text(f"{line}\n" * count)
    (tmp_path / "list.json").write_text("[" + ",\n".join([line] * count) + "]")
    (tmp_path / "table.csv").write_text("instruction,response\n" + f"{'a' * 900},{'b' * 600}\n" * count)
    names = [str(tmp_path / name) for name in ("lines.jsonl", "list.json", "table.csv")]
    assert sum(Path(name).stat().st_size for name in names) > 55e6
    done = subprocess.run([sys.executable, "-c", MEASURE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    number, grown = map(int, done.stdout.split())
    assert number == 3 * count
    assert grown < 24

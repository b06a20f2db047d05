"""`data check`: figures, what is rendered, the advice, the screen, and the cases of data that people bring."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.data import CheckConfig
from mixtral_run.errors import ConfigError, escaped
from mixtral_run.train.data.check.check import CheckResult, check_data
from mixtral_run.train.data.check.check_encoding import load_encoding
from mixtral_run.train.data.check.check_screen import check_lines, colored
from mixtral_run.train.data.check.length_advice import advise, histogram

ROOT = Path(__file__).parents[4]


def case(name: str, content: str | bytes, words: str) -> Any:
    return pytest.param(name, content, words, id=name)


def lines(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows))


CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5", "weight": 0},
        {"role": "user", "content": "No."}, {"role": "assistant", "content": "4", "weight": 1}]  # fmt: skip
PAIR = {"instruction": "a", "response": "b"}
CASES = [
    case(
        "dolly_context.jsonl",
        lines({"instruction": "When?", "context": "On 3 May.", "response": "3 May", "category": "closed_qa"}),
        "<s>[INST] When?\n\nOn 3 May. [/INST]⟦ 3 May</s>⟧",
    ),
    case(
        "empty_system.jsonl",
        lines({"messages": [{"role": "system", "content": ""}, *CHAT[:1], {"role": "assistant", "content": "4"}]}),
        "<s>[INST] 2+2? [/INST]⟦ 4</s>⟧",
    ),
    case("gz.jsonl.gz", gzip.compress(lines(PAIR).encode()), "<s>[INST] a [/INST]⟦ b</s>⟧"),
    case(
        "indent_lost_pair.jsonl",
        lines({"instruction": "def f(x):", "response": "    return x + 1"}),
        "<s>[INST] def f(x): [/INST]⟦     return x + 1</s>⟧",
    ),
    case("json_list.json", json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 3, indent=2),
         "<s>[INST] a [/INST]⟦ b</s>⟧"),
    case("message_weight.jsonl", lines({"messages": CHAT}),
         "<s>[INST] 2+2? [/INST] 5</s>[INST] No. [/INST]⟦ 4</s>⟧"),
    case("sharegpt.json", json.dumps([{"conversations": [{"from": "human", "value": "a"},
                                                         {"from": "gpt", "value": "b"}]}]),
         "<s>[INST] a [/INST]⟦ b</s>⟧"),
    case("table.csv", "question,answer\na,b\n", "<s>[INST] a [/INST]⟦ b</s>⟧"),
    case("plain.jsonl", lines({"text": "a b"}), "<s>⟦a b</s>⟧"),
    case("utf16.jsonl", lines(PAIR).encode("utf-16"), "<s>[INST] a [/INST]⟦ b</s>⟧"),
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer_folder: Path) -> Any:
    return load_encoding(tiny_tokenizer_folder, "mixtral")


def check(path: Path, encoder: Any, **more: Any) -> CheckResult:
    return check_data(CheckConfig(data_path=(str(path),), **more).check(), encoder)


@pytest.mark.parametrize(("name", "content", "rendered"), CASES)
def test_each_case_reaches_the_rows_as_it_should(
    tmp_path: Path, encoder: Any, name: str, content: str | bytes, rendered: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = check(path, encoder)
    assert result.num_bad == 0
    screen = "\n".join(check_lines(result, color=False))
    marked = re.sub(r"</?s>", r"‹\g<0>›", rendered)
    assert marked in re.sub(r"(‹</?s>›) *", r"\1", screen), screen


def test_half_of_an_emoji_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "lone_surrogate_pair.jsonl"
    path.write_text('{"instruction":"ok","response":"ok"}\n{"instruction":"cut \\ud83d here","response":"fine"}\n')
    done = CliRunner().invoke(root, ["data", "check", str(path)])
    assert isinstance(done.exception, ConfigError) and done.exception.exit_code == 2
    assert "- line 2: 'instruction': half of a surrogate pair, \\ud83d, at character 5 (column 21 of" in done.output


def test_figures_are_those_of_the_tokenizer(tmp_path: Path, encoder: Any, tiny_tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"{n} times", "response": "word " * n, "id": n} for n in (1, 5, 60, 5)]
    rows[3]["id"] = "another"
    path.write_text(lines(*rows) + "\n{\n")
    result = check(path, encoder, seq_length=64)
    whole, answers = [], []
    for row in rows:
        prompt = tiny_tokenizer(f"[INST] {row['instruction']} [/INST]", add_special_tokens=False)["input_ids"]
        text = f"[INST] {row['instruction']} [/INST] {row['response']}"
        both = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        whole.append(len(both) + 2)
        answers.append(len(both) - len(prompt) + 1)
    lengths = result.lengths
    assert lengths is not None
    assert (lengths.num_tokens, lengths.num_learned) == (sum(whole), sum(answers))
    assert (lengths.shortest, lengths.median, lengths.longest) == (min(whole), sorted(whole)[1], max(whole))
    assert lengths.num_truncated == sum(each > 65 for each in whole) == 1
    assert (result.num_duplicates, result.duplicates) == (1, ["line 4"])
    assert (result.num_bad, result.unused_keys, result.counts_by_shape) == (1, {"id": 4}, {"instruction": 4})
    assert [each.place for each in result.rendered] == ["line 1", "line 2", "line 3"]


def test_examples_of_different_kinds_are_rendered(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    tool = {"messages": [CHAT[0], {"role": "assistant", "content": "5"}, *CHAT[2:]]}
    path.write_text(lines(*[{**PAIR, "instruction": str(n)} for n in range(9)], tool, {"text": "plain"}))
    result = check(path, None)
    assert [each.place for each in result.rendered] == ["line 1", "line 10", "line 11"]
    assert result.lengths is None
    assert "user: 0\nassistant: ⟦b⟧" in "\n".join(check_lines(result, color=False))


def test_what_the_template_does_not_have_is_a_problem(tmp_path: Path, encoder: Any) -> None:
    path = tmp_path / "data.jsonl"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    path.write_text(lines(PAIR, {"messages": [CHAT[0], call]}))
    result = check(path, encoder)
    (problem,) = result.problems
    assert problem.startswith("line 2: tools: Mixtral-Instruct's form has none for this tokenizer")


def test_the_advice_is_the_shortest_length_that_truncates_little() -> None:
    lengths = np.array([100] * 990 + [1000] * 10, np.int32)
    starts = np.full(1000, 50, np.int32)
    advice = advise(lengths, starts, 512)
    assert (advice.seq_length, advice.pack) == (128, True)
    chosen = {each.seq_length: each for each in advice.choices}
    assert {128, 512} <= set(chosen)
    assert (chosen[512].num_truncated, chosen[512].num_packed_rows) == (10, -(-(990 * 99 + 10 * 512) // 512))
    assert chosen[512].padding == pytest.approx(1 - (990 * 99 + 10 * 512) / 512_000)
    # Something of every example must be left to learn.
    starts[-1] = 900
    assert advise(lengths, starts, 512).seq_length == 1024
    full = advise(np.array([129] * 50, np.int32), np.full(50, 3, np.int32), 128)
    assert (full.seq_length, full.pack, full.choices[0].padding) == (128, False, 0.0)


def test_lengths_to_choose_from_and_those_around_the_advised_one() -> None:
    """One of 100 examples may be truncated, two may not. Two lengths below the advised one are shown, and two above."""
    starts = np.zeros(100, np.int32)
    for num_long, advised in ((1, 400), (2, 5000)):
        lengths = np.array([300] * 80 + [400] * (20 - num_long) + [5000] * num_long, np.int32)
        advice = advise(lengths, starts, 777)
        steps = [128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
        at = next(number for number, step in enumerate(steps) if step + 1 >= advised)
        assert advice.seq_length == steps[at]
        assert [each.seq_length for each in advice.choices] == sorted({777, *steps[max(0, at - 2) : at + 3]})
    # A label needs a token before it: 129 tokens fill 128 positions.
    assert advise(np.array([129], np.int32), np.zeros(1, np.int32), 128).seq_length == 128
    assert advise(np.array([130], np.int32), np.zeros(1, np.int32), 128).seq_length == 192
    # Longer than all lengths to choose from.
    longest = advise(np.array([200_000], np.int32), np.zeros(1, np.int32), 128)
    assert longest.seq_length == 98_304 and longest.choices[-1].num_truncated == 1
    # A fifth of padding needs no packing, one token more does: of 5 rows of 128 one is empty.
    for lengths, pack in (([129] * 4 + [1], False), ([129] * 3 + [128, 1], True)):
        assert advise(np.array(lengths, np.int32), np.zeros(5, np.int32), 128).pack is pack


def test_the_histogram_counts_every_length_once() -> None:
    lengths = np.array([1, 64, 65, 128, 129, 2049], np.int32)
    rows = histogram(lengths)
    for row in rows:
        assert row.num_examples == sum(row.above < length <= row.up_to for length in lengths)
    assert sum(row.num_examples for row in rows) == 6
    assert [(row.above, row.up_to) for row in rows[:2]] == [(0, 64), (64, 128)] and rows[-1].up_to == 4096


def test_color_and_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(lines({"instruction": "a\x1b[2J\u202e", "response": "b", "k\x1b[": 1}))
    result = check(path, None)
    assert "assistant: \x1b[32mb\x1b[0m" in "\n".join(check_lines(result, color=True))
    plain = "\n".join(check_lines(result, color=False))
    assert "\x1b" not in plain and "a\\x1b[2J\\u202e" in plain and "⟦b⟧" in plain
    assert escaped("日本\u3000é\tx\n🙂") == "日本\u3000é\tx\n🙂"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colored(Terminal()) and not colored(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colored(Terminal())


def test_json_has_everything_even_if_keys_cannot_be_printed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "a", "response": "b", "\\ud83d": 1}\n{\n')
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(ConfigError):
        root.main(["data", "check", str(path), "--json"], standalone_mode=False)
    found = json.loads(out.getvalue().encode("utf-8").decode())
    assert found["unused_keys"] == {"\\ud83d": 1}
    assert (found["ok"], found["num_bad"], found["counts_by_shape"]) == (False, 1, {"instruction": 1})
    assert found["problems"][0].startswith("line 2: broken JSON") and found["error"]["exit_code"] == 2


def test_a_model_without_a_tokenizer_and_bad_data_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(lines(PAIR) + "\n{\n")
    done = CliRunner().invoke(root, ["data", "check", str(path), "--load", str(tmp_path / "none")])
    assert "1 example\n  shapes: instruction 1" in done.output
    for words in ("2 things stand in the way", str(tmp_path / "none"), "1 example cannot be used"):
        assert words in str(done.exception)


DOCUMENTED = {
    "alpaca.json": json.dumps(
        [{"instruction": "Name the capital.", "input": "Australia", "output": "Canberra."},
         {"instruction": "Name three colors.", "input": "", "output": "Red, green and blue."},
         {"instruction": "Name three colors.", "input": "", "output": "Red, green and blue."}], indent=1),
    "dolly.jsonl": lines(
        {"instruction": "When did the firm begin?", "context": "The firm opened its doors on 3 May 1999.",
         "response": "On 3 May 1999.", "category": "closed_qa"},
        {"instruction": "Name a fish.", "context": "", "response": "Cod.", "category": "open_qa"}),
    "sharegpt.json": json.dumps(
        [{"id": "x1", "conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4."},
                                        {"from": "human", "value": "And 3 more?"}]}]),
    "openai.jsonl": lines(
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"},
                      {"role": "assistant", "content": "5.", "weight": 0}, {"role": "user", "content": "Again."},
                      {"role": "assistant", "content": "4.", "weight": 1}]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "user", "content": "?"}]}),
}  # fmt: skip
"""Files of which docs/data.md shows what `data check` prints."""


def screens(folder: Path, encoder: Any) -> dict[str, list[str]]:
    found = {}
    for name, content in DOCUMENTED.items():
        (folder / name).write_text(content)
        with contextlib.chdir(folder):
            found[name] = check_lines(check(Path(name), encoder, seq_length=128), color=False)
    return found


def test_the_screens_of_the_document_are_current(tmp_path: Path, encoder: Any) -> None:
    """To renew them: copy what this test prints into docs/data.md."""
    text = (ROOT / "docs/data.md").read_text()
    for name, screen in screens(tmp_path, encoder).items():
        block = "\n".join(f"    {line}".rstrip() for line in screen)
        print(block)
        assert f"    $ mixtral-run data check {name} --load mixtral --seq-length 128\n{block}\n" in text

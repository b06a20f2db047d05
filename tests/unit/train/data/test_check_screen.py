"""What `data check` prints, whole, for results that are written out here, and the figures around each boundary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixtral_run.config.data import CheckConfig
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.check import check, length_advice, rendering, run_check
from mixtral_run.train.data.check.check import CheckResult, check_data, content_digest
from mixtral_run.train.data.check.check_encoding import CheckEncoding
from mixtral_run.train.data.check.check_screen import check_lines
from mixtral_run.train.data.check.length_advice import Advice, LengthChoice, LengthRow, advise, histogram
from mixtral_run.train.data.check.length_count import LengthCount, Lengths
from mixtral_run.train.data.check.rendering import Part, Rendered
from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, USER, Example, Message
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.templates.encoded import EncodedExample

ROWS = (LengthRow(0, 64, 80), LengthRow(64, 128, 0), LengthRow(128, 256, 1), LengthRow(256, 512, 3))
CHOICES = (LengthChoice(1024, 12, 3, 0.256, 4567), LengthChoice(2048, 1, 0, 0.5, 2345))


def result(**values: Any) -> CheckResult:
    lengths: dict[str, Any] = {
        "num_tokens": 12000, "num_learned": 3000, "num_truncated": 2, "num_unlearned": 1, "shortest": 5,
        "median": 40, "longest": 1200, "rows": ROWS, "advice": Advice(2048, True, CHOICES),
    }  # fmt: skip
    for name in set(lengths) & set(values):
        lengths[name] = values.pop(name)
    given = {"num_examples": 1234, "counts_by_shape": {"messages": 1230, "text": 4}, "lengths": Lengths(**lengths)}
    return CheckResult(("a.jsonl", "b\x1b.csv"), 1024, **given | values)


def test_the_whole_screen() -> None:
    found = result(
        num_duplicates=3, duplicates=["line 2", "line 5"], num_bad=1001, problems=["line 7: odd\x1b"],
        remarks=["a remark"], rendered=[Rendered("line 1", (Part("[INST] a", False), Part(" b", True)))],
    )  # fmt: skip
    assert check_lines(found, color=False) == [
        "a.jsonl b\\x1b.csv: 1,234 examples",
        "  shapes: messages 1,230, text 4",
        "  exact duplicates: 3 (line 2; line 5; …)",
        "  examples that cannot be used: 1,001",
        "    - line 7: odd\\x1b",
        "  ! a remark",
        "  tokens: 12,000, of which 3,000 (25%) count in the loss",
        "  length of an example: 5 to 1,200 tokens, median 40",
        "          1 –      64         80  " + "█" * 40,
        "         65 –     128          0",
        "        129 –     256          1  █",
        "        257 –     512          3  ██",
        "  --seq-length 1,024 truncates 2 examples; 1 has nothing left to train on",
        "  --seq-length   truncated   nothing left   padding   rows with --pack, at least",
        "         1,024          12              3       26%       4,567",
        "         2,048           1              0       50%       2,345   ← choose this",
        "  next: mixtral-run finetune --seq-length 2048 --pack …",
        "",
        "line 1:",
        "[INST] a⟦ b⟧",
        "",
        "What is in ⟦ ⟧ counts in the loss; the rest is context.",
    ]
    assert check_lines(found, color=True)[-3:] == [
        "[INST] a\x1b[32m b\x1b[0m", "", "What is green counts in the loss; the rest is context."
    ]  # fmt: skip


def test_lines_of_other_results() -> None:
    few = result(num_duplicates=2, duplicates=["line 2", "line 5"], counts_by_shape={}, num_unlearned=2)
    few.lengths = Lengths(1, 1, 1, 2, 1, 1, 1, (LengthRow(0, 64, 1),), Advice(1024, False, ()))
    screen = check_lines(few, color=False)
    assert screen[1:3] == ["  shapes: none", "  exact duplicates: 2 (line 2; line 5)"]
    assert screen[4] == "  tokens: 1, of which 1 (100%) count in the loss"
    assert screen[7] == "  --seq-length 1,024 truncates 1 example; 2 have nothing left to train on"
    assert screen[-1] == "  next: mixtral-run finetune --seq-length 1024 …"
    assert check_lines(result(lengths=None), color=False) == [
        "a.jsonl b\\x1b.csv: 1,234 examples", "  shapes: messages 1,230, text 4", "  exact duplicates: 0",
        "  examples that cannot be used: 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("longest", "truncated", "needed", "refused"),
    [
        (2, 1, 64, "1 answer is"),
        (65, 0, 64, "0 answers are"),
        (64, 0, 64, "0 answers are"),
        (66, 2, 128, "2 answers are"),
        (128, 0, 128, "0 answers are"),
        (129, 0, 128, "0 answers are"),
        (130, 0, 192, "0 answers are"),
    ],
)
def test_the_length_that_align_needs(longest: int, truncated: int, needed: int, refused: str) -> None:
    """Of n tokens n - 1 positions have a label; lengths are multiples of 64."""
    screen = check_lines(result(method="dpo", longest=longest, num_truncated=truncated), color=False)
    assert screen[5] == f"  length of an answer with its prompt: 5 to {longest} tokens, median 40"
    assert screen[-2] == f"  {refused} longer than --seq-length 1,024, which align refuses"
    assert screen[-1] == f"  next: mixtral-run align --method dpo --seq-length {needed} …"


def shown(*parts: str) -> list[str]:
    """The texts of an example's parts on the screen; each is learned, and in brackets."""
    rendered = Rendered("line 1", tuple(Part(each, True) for each in parts))
    line = check_lines(CheckResult(("a",), 64, rendered=[rendered]), color=False)[-3]
    return line.removeprefix("⟦").removesuffix("⟧").split("⟧⟦")


def test_the_middle_of_long_parts_is_left_out() -> None:
    """All parts together have 1,500 characters, each at least 40."""
    whole = "".join(chr(ord("a") + number % 26) for number in range(1501))
    assert shown(whole[:1500]) == [whole[:1500]]
    assert shown(whole) == [f"{whole[:750]} … 1 characters … {whole[-750:]}"]
    assert shown(whole, "b") == [f"{whole[:375]} … 751 characters … {whole[-375:]}", "b"]
    many = ["x"] * 99
    assert shown(whole[:40], *many)[0] == whole[:40]
    assert shown(whole[:41], *many)[0] == f"{whole[:20]} … 1 characters … {whole[21:41]}"
    assert shown(whole + "z" * 600, *many)[0] == f"{whole[:20]} … 2,061 characters … {'z' * 20}"


ANY = Example("line 1", text="a")


def count(seq_length: int, *examples: tuple[int, int]) -> Lengths:
    """Figures of examples: tokens, and the first that is learned."""
    counted = LengthCount(CheckConfig(seq_length=seq_length))
    for tokens, start in examples:
        spans = ((start, tokens),) if start < tokens else ()
        counted.add(ANY, [EncodedExample(np.zeros(tokens, np.int32), spans)])
    return counted.result()


def test_what_fits_into_a_sample() -> None:
    """A sample of 8 positions has room for 9 tokens; the last of them is learned, and no later one."""
    found = count(8, (8, 4), (9, 8), (10, 8), (10, 9), (12, 5), (9, 9))
    assert (found.num_truncated, found.num_unlearned) == (3, 2)
    assert (found.num_tokens, found.num_learned) == (58, 4 + 1 + 2 + 1 + 7 + 0)
    assert (found.shortest, found.median, found.longest) == (8, 9, 12)
    assert (found.advice.choices[0].num_truncated, found.advice.choices[0].num_unlearned) == (3, 2)
    odd = count(9, (10, 9), (11, 9), (11, 10), (12, 11))
    assert (odd.num_truncated, odd.num_unlearned, odd.num_learned) == (3, 2, 1 + 2 + 1 + 1)
    choice = odd.advice.choices[0]
    assert (choice.seq_length, choice.num_truncated, choice.num_unlearned) == (9, 3, 2)
    # 36 positions have a label in four rows of 9: no padding, and four full rows.
    assert (choice.padding, choice.num_packed_rows) == (0.0, 4)
    two_spans = LengthCount(CheckConfig(seq_length=8))
    two_spans.add(ANY, [EncodedExample(np.zeros(20, np.int32), ((3, 5), (9, 16)))])
    assert (two_spans.result().num_learned, two_spans.result().num_unlearned) == (2 + 7, 0)


def test_steps_and_rows() -> None:
    steps = [128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152]
    assert [*map(int, length_advice.STEPS)] == [*steps, 65536, 98304]
    # Exactly at a step: 193 tokens fill 192 positions, and no shorter length is needed beside it.
    advice = advise(np.array([193], np.int32), np.zeros(1, np.int32), 192)
    assert (advice.seq_length, [each.seq_length for each in advice.choices]) == (192, [128, 192])
    assert [(each.above, each.up_to, each.num_examples) for each in histogram(np.array([65, 300, 512], np.int32))] == [
        (64, 128, 1), (128, 256, 0), (256, 512, 2),
    ]  # fmt: skip


def example(place: str, *roles: str, content: str = "a") -> Example:
    return Example(place, tuple(Message(role, content) for role in roles))


def test_the_examples_that_are_shown() -> None:
    """Kinds differ within the first four messages. Three are shown: one of each kind before a second of one."""
    pair = (USER, ASSISTANT)
    four = (SYSTEM, *pair, USER)
    given = [
        example("1", *pair), example("2", *pair), example("3", *four, ASSISTANT), example("4", *four, USER),
        example("5", *pair),
    ]  # fmt: skip
    chosen = check._Shown()
    for each in given:
        chosen.offer([each], None)
    assert [answers[0].place for answers, _ in chosen.chosen()] == ["1", "3", "2"]
    first_three = check._Shown()
    for number in range(5):
        first_three.offer([example(str(number), *pair, content=str(number))], None)
    assert [answers[0].place for answers, _ in first_three.chosen()] == ["0", "1", "2"]


def test_what_makes_two_examples_the_same() -> None:
    one = example("line 1", USER, ASSISTANT)
    assert content_digest(one) == content_digest(example("line 2", USER, ASSISTANT))
    others = [
        example("line 1", SYSTEM, ASSISTANT),
        example("line 1", USER, ASSISTANT, content="b"),
        Example("line 1", one.messages, rejected=one.messages),
        Example("line 1", (one.messages[0], Message(ASSISTANT, "a", learned=False))),
        Example("line 1", (), text="a"),
    ]
    assert len({content_digest(each) for each in (one, *others)}) == 6


def test_duplicates_and_refused_examples_are_counted(tmp_path: Any) -> None:
    """Ten duplicates are named. What the template refuses is no example, and the first that it takes is shown."""
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"instruction": "no", "response": "b"}\n' * 2 + '{"instruction": "a", "response": "b"}\n' * 12 + "{\n"
    )
    num_read: list[int] = []

    def encode(given: Example) -> EncodedExample:
        if given.messages[0].content == "no":
            raise ConfigError("Refused.")
        return EncodedExample(np.arange(6, dtype=np.int32), ((2, 4),))

    def decode(tokens: list[int]) -> str:
        return "".join("abcdefgh"[each] for each in tokens)

    config = CheckConfig(data_path=(str(file),), seq_length=64).check()
    found = check_data(config, CheckEncoding(encode, decode), num_read.append)
    assert num_read == [1] * 14
    assert (found.num_examples, found.num_duplicates, found.num_bad) == (12, 12, 3)
    assert found.duplicates == ["line 2", *(f"line {number}" for number in range(4, 13))]
    assert found.rendered == [
        Rendered(
            "line 3", (Part("ab", False), Part("cd", True), Part("ef", False)), (0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 0, 0)
        )
    ]
    assert found.to_mapping()["ok"] is False and CheckResult(("a",), 64).to_mapping()["ok"] is True


def test_data_without_an_example_are_an_error_unless_a_problem_says_why(tmp_path: Any) -> None:
    def encode(given: Example) -> EncodedExample:
        raise ConfigError("Refused.")

    file = tmp_path / "data.jsonl"
    config = CheckConfig(data_path=(str(file),), seq_length=64).check()
    file.write_text("")
    with pytest.raises(ConfigError, match="contain no"):
        check_data(config, None)
    for text, encoder, bad in (("{\n{\n", None, 2), ('{"instruction": "a", "response": "b"}\n', encode, 1)):
        file.write_text(text)
        found = check_data(config, CheckEncoding(encoder, str) if encoder else None)
        assert (found.num_examples, found.num_bad, found.lengths, found.rendered) == (0, bad, None, [])


def test_a_result_begins_with_nothing() -> None:
    assert CheckResult(("a",), 64).to_mapping() == {
        "ok": True, "sources": ("a",), "seq_length": 64, "method": None, "pack": False, "num_examples": 0,
        "counts_by_shape": {}, "unused_keys": {}, "remarks": [],
        "num_trimmed": 0, "num_duplicates": 0, "duplicates": [], "num_bad": 0,
        "problems": [], "num_problems": 0, "num_too_long": 0, "spelled": [], "lengths": None, "rendered": [],
    }  # fmt: skip


def test_messages_without_tokens_are_shown_by_role() -> None:
    calls = ({"name": "f"},)
    given = Example(
        "line 1",
        (Message(USER, "a"), Message(ASSISTANT, "b", tool_calls=calls), Message(ASSISTANT, "c", learned=False)),
    )
    assert rendering.rendered_messages(given).parts == (
        Part("user: ", False), Part("a", False), Part("\n", False), Part("assistant: ", False),
        Part('b [{"name": "f"}]', True), Part("\n", False), Part("assistant: ", False), Part("c", False),
    )  # fmt: skip
    assert rendering.rendered_messages(Example("line 2", (), text="a b")).parts == (Part("a b", True),)


def test_a_decoder_that_changes_the_text_before_gets_the_part_alone() -> None:
    texts = {(): "", (1,): "x", (1, 2): "xy", (1, 2, 3): "other", (3,): "z"}
    found = rendering.rendered_tokens("p", [1, 2, 3], [(1, 2)], lambda tokens: texts[tuple(tokens)])
    assert found.parts == (Part("x", False), Part("y", True), Part("z", False))
    joined = "".join
    several = rendering.rendered_tokens("p", [*"abcdef"], [(0, 1), (2, 3), (3, 5)], joined)  # type: ignore[arg-type]
    assert [(part.text, part.learned) for part in several.parts] == [
        ("a", True), ("b", False), ("c", True), ("de", True), ("f", False),
    ]  # fmt: skip
    assert rendering.rendered_tokens("p", [1], [(0, 1)], lambda tokens: texts[tuple(tokens)]).parts == (
        Part("x", True),
    )


def test_good_data_end_without_an_error(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n')
    run_check.run_check(CheckConfig(data_path=(str(file),)).check())
    assert capsys.readouterr().out.startswith(f"{file}: 1 example\n")
    error = check.problem_error(CheckResult(("a", "b"), 64, num_examples=1, num_bad=2, method="dpo"))
    assert (error.what, error.where) == ("2 examples cannot be used.", "a b") and "run align …" in str(error)
    assert "run finetune …" in str(check.problem_error(CheckResult(("a",), 64, num_examples=1, num_bad=1)))
    assert check.problem_error(CheckResult(("a",), 64, num_bad=1)).next_command == "correct them"


def test_preferences_are_sent_to_align(tmp_path: Any) -> None:
    """Neither correcting them nor leaving them out would help."""
    file = tmp_path / "my pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(ConfigError) as caught:
        run_check.run_check(CheckConfig(data_path=(str(file),)).check())
    assert caught.value.next_command == f"mixtral-run data check '{file}' --method dpo, with the other flags"
    with pytest.raises(ConfigError) as caught:
        read_examples([str(file)], ReadOptions()).check()
    assert caught.value.next_command == "mixtral-run align --method dpo …, which learns from preferences"


def test_a_conversation_of_many_turns_is_decoded_in_a_time_that_grows_with_its_length() -> None:
    decoded = 0

    def decode(tokens: list[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return "".join(f" {token}" for token in tokens).lstrip(" ")

    tokens = list(range(9_000))
    spans = [(begin, begin + 3) for begin in range(0, len(tokens), 6)]
    found = rendering.rendered_tokens("p", tokens, spans, decode)
    assert "".join(part.text for part in found.parts) == "".join(f" {token}" for token in tokens).lstrip(" ")
    assert decoded < 100 * len(tokens)

"""Small parts of chat templates and encodings: spans, turns, hashes of contents, ids, words and their limits."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AddedToken

from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.train.data.reading.example import ASSISTANT, USER, Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates import (
    chat_template,
    encoding,
    jinja_template,
    mixtral_form,
    prompt,
    template_sandbox,
    text_encoder,
    word_cache,
)
from mixtral_run.train.data.templates.chat_template import ChatTemplate
from mixtral_run.train.data.templates.encoding import content_digest
from mixtral_run.train.data.templates.text_encoder import TextEncoder
from mixtral_run.train.data.templates.word_cache import WordCache


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], ()),
        ([(4, 6), (1, 3)], ((1, 3), (4, 6))),
        ([(1, 3), (3, 5)], ((1, 3), (3, 5))),
        ([(1, 4), (3, 5)], ((1, 5),)),
        ([(1, 9), (3, 5), (8, 10)], ((1, 10),)),
        ([(1, 3), (1, 3)], ((1, 3),)),
        ([(1, 3), (4, 8), (6, 9)], ((1, 3), (4, 9))),
        ([(1, 3), (4, 9), (5, 6)], ((1, 3), (4, 9))),
        ([(1, 2), (3, 5), (6, 9), (7, 8), (9, 10)], ((1, 2), (3, 5), (6, 9), (9, 10))),
    ],
)
def test_each_token_counts_once(spans: Any, expected: Any) -> None:
    assert chat_template._disjoint(spans) == expected


class Played(ChatTemplate):
    """STAND-IN for a template: three ids, and spans that are given."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        record: Any = SimpleNamespace(name="own", fingerprint="f")
        encoder: Any = SimpleNamespace(definition="d", text_ids=lambda text: [ord(each) for each in text])
        super().__init__(record, encoder, 1, 2)
        self.spans = spans

    def prompt(self, messages: Any, tools: Any = ()) -> list[int]:
        return []

    def describe(self) -> str:
        return ""

    def _encode_messages(self, example: Example) -> tuple[list[int], list[tuple[int, int]]]:
        return [1, 10, 11, 2], self.spans


def conversation(*contents: str, learned: bool = True) -> Example:
    roles = (USER, ASSISTANT) * 9
    return Example("line 3", tuple(Message(role, text, learned) for role, text in zip(roles, contents, strict=False)))


def test_learned_tokens_have_one_before_them() -> None:
    """The first token of a row is no label. Of a plain text all others are learned, with the end of the text."""
    assert Played([(0, 2), (3, 4), (2, 2)]).encode(conversation("a", "b")).learned == ((1, 2), (3, 4))
    for spans in ([(0, 1)], [(2, 2)], [(0, 0)], []):
        with pytest.raises(ExampleProblem, match="no token counts in the loss") as caught:
            Played(spans).encode(conversation("a", "b"))
        assert caught.value.where == "line 3"
    plain = Played([]).encode(Example("line 1", (), text="AB"))
    assert plain.tokens.tolist() == [1, 65, 66, 2] and plain.learned == ((1, 4),) and plain.tokens.dtype == np.int32
    assert Played([(1, 3)]).stop_ids == {2, 11} and Played([]).stop_ids == {2}
    # The last token of the last span: of the second one, and at even and odd places.
    assert Played([(1, 2), (2, 3)]).stop_ids == {2, 11} and Played([(1, 2), (3, 4)]).stop_ids == {2}
    assert Played([(1, 2)]).stop_ids == {2, 10} and Played([(1, 4)]).stop_ids == {2}
    prints = {Played([]).fingerprint, Played([]).fingerprint}
    other = Played([])
    other._bos_id = 5
    assert len(prints) == 1 and other.fingerprint not in prints


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        (Example("p", ()), "the conversation has no messages"),
        (conversation("a"), "the conversation ends with the user; expected an answer of the assistant"),
        (conversation("a", "b", "c", ""), "message 4: the assistant's answer is empty"),
        (conversation("a", "", "c", "d"), "message 2: the assistant's answer is empty"),
        (
            conversation("a", "b", learned=False),
            "no answer counts in the loss: 'weight' 0 or 'train' false on every one",
        ),
    ],
)
def test_conversations_without_an_answer(example: Example, problem: str) -> None:
    with pytest.raises(ExampleProblem) as caught:
        Played([(1, 2)]).encode(example)
    assert (caught.value.problem, caught.value.where) == (problem, example.place)
    called = Example("p", (Message(USER, "a"), Message(ASSISTANT, "", tool_calls=({"id": 1},))))
    assert Played([(1, 2)]).encode(called).learned == ((1, 2),)


def test_what_makes_two_contents_the_same() -> None:
    pair = (Message(USER, "a"), Message(ASSISTANT, "b"))
    same = [
        Example("line 1", pair),
        Example("line 2", (Message(USER, " a\n"), Message(ASSISTANT, "b", learned=False))),
        Example("line 3", (Message("system", " "), *pair)),
    ]
    assert len({content_digest(each) for each in same}) == 1 and 0 <= content_digest(same[0]) < 2**64
    others = [
        Example("", pair, rejected=pair),
        Example("", pair, rejected=(pair[0], Message(ASSISTANT, "c"))),
        Example("", pair, label=True),
        Example("", pair, label=False),
        Example("", pair, tools=({"a": 1},)),
        Example("", (), text="a"),
        Example("", (Message(ASSISTANT, "a"), Message(ASSISTANT, "b"))),
        Example("", (Message(USER, "a"), Message(ASSISTANT, "b", tool_call_id="c"))),
        Example("", (Message(USER, "a", name="x"), Message(ASSISTANT, "b"))),
        Example("", (Message(USER, "a"), Message(ASSISTANT, "b", tool_calls=({"id": 1},)))),
    ]
    assert len({content_digest(each) for each in (same[0], *others)}) == 11


@pytest.mark.parametrize(
    ("bos", "eos", "highest", "problems"),
    [
        (1, 2, 9, []),
        (1, 2, 10, ["data: token 't10' has id 10; the model's ids end at 9"]),
        (1, 10, 9, ["eos_token '</s>' has id 10; the model's ids end at 9"]),
        (1, 10, 10, ["eos_token '</s>' has id 10; the model's ids end at 9"]),
        (11, 10, 12, ["bos_token '<s>' has id 11; the model's ids end at 9",
                      "eos_token '</s>' has id 10; the model's ids end at 9",
                      "data: token 't12' has id 12; the model's ids end at 9"]),
    ],
)  # fmt: skip
def test_ids_that_the_model_has_no_row_for(bos: int, eos: int, highest: int, problems: list[str]) -> None:
    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return 1234

    tokenizer: Any = Tokenizer(
        bos_token="<s>", eos_token="</s>", bos_token_id=bos, eos_token_id=eos,
        convert_ids_to_tokens=lambda number: f"t{number}",
    )  # fmt: skip
    if not problems:
        prompt.check_token_ids(tokenizer, highest, 10, SimpleNamespace(), "data")  # type: ignore[arg-type]
        return
    with pytest.raises(WeightsError) as caught:
        prompt.check_token_ids(tokenizer, highest, 10, SimpleNamespace(), "data")  # type: ignore[arg-type]
    assert list(caught.value.problems) == problems and caught.value.found == "a tokenizer of 1,234 tokens"
    with pytest.raises(WeightsError) as caught:
        prompt.check_token_ids(tokenizer, highest, 10, SimpleNamespace())  # type: ignore[arg-type]
    assert not any("data: " in each for each in caught.value.problems)


def test_padding_and_size_of_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(eos_token_id=7, get_vocab=lambda: {"a": 3, "b": 11, "c": 0})
    template = SimpleNamespace(record=SimpleNamespace(to_mapping=lambda: {"name": "x"}))
    monkeypatch.setattr(encoding, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(encoding, "open_chat_template", lambda *_: template)
    found = encoding.Encoding(SimpleNamespace(), "auto").facts()  # type: ignore[arg-type]
    assert found == {"padding_id": 7, "tokenizer_size": 12, "chat_template": {"name": "x"}}


def test_words_are_kept_up_to_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of up to 40 characters, with their mark; of them the first 500,000."""
    assert (word_cache.MOST_WORDS, word_cache.LONGEST_WORD) == (500_000, 40)
    monkeypatch.setattr(word_cache, "MOST_WORDS", 2)
    asked: list[str] = []

    def encode(text: str, add_special_tokens: bool) -> Any:
        assert add_special_tokens is False
        asked.append(text)
        return SimpleNamespace(ids=[len(text)])

    words = object.__new__(WordCache)
    words._words, words._tokenizer = {}, SimpleNamespace(encode=encode)
    assert words.text_ids("") == [] and asked == []
    longest = "x" * 39
    assert words.text_ids(f"a  b {longest}x") == [2, 3, 41]
    assert asked == ["▁a", "▁▁b", f"▁{longest}x"] and set(words._words) == {"▁a", "▁▁b"}
    words.text_ids("a a c c ")
    assert asked[3:] == ["▁c", "▁c", "▁"]
    words._words.clear()
    words.text_ids(longest)
    assert list(words._words) == [f"▁{longest}"]


PLACES = [(0, 3), (3, 3), (3, 5), (5, 9)]
"""Characters of four tokens, the second of which has none."""


@pytest.mark.parametrize(
    ("begin", "end", "tokens"),
    [(0, 9, (0, 4)), (0, 3, (0, 1)), (3, 5, (1, 3)), (4, 6, (2, 4)), (5, 9, (3, 4)), (0, 1, (0, 1)), (3, 9, (1, 4))],
)
def test_tokens_of_characters(begin: int, end: int, tokens: tuple[int, int]) -> None:
    assert jinja_template._tokens_of(begin, end, PLACES) == tokens


def test_messages_as_templates_read_them() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": json.dumps({"a": 1})}}
    found = jinja_template._values(Message(ASSISTANT, "", tool_calls=(call,), tool_call_id="t", name="n"))
    assert found == {
        "role": ASSISTANT, "content": "", "tool_call_id": "t", "name": "n",
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}],
    }  # fmt: skip
    assert jinja_template._values(Message(USER, "a")) == {"role": USER, "content": "a"}
    for other in ({"function": 3}, {"function": {"arguments": {}}}, {"function": {"arguments": "{"}},
                  {"function": {"arguments": "[" * 100_000}}, {"function": {"arguments": "3"}}, {}):  # fmt: skip
        assert jinja_template._call(other) == other
    given = {"role": "r", "x": ["a", ("b", 3)], "y": {"role": "r", "z": "c"}}
    assert text_encoder.mapped(given, str.upper) == {
        "role": "r", "x": ["A", ("B", 3)], "y": {"role": "r", "z": "C"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("soft", "hard", "limit"),
    [
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 3 * resource.getpagesize() + 2_147_483_648),
        (1000, resource.RLIM_INFINITY, 1000),
        (resource.RLIM_INFINITY, 2000, 2000),
        (2**40, 2**41, 3 * resource.getpagesize() + 2_147_483_648),
    ],
)
def test_the_memory_of_a_rendering(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, limit: int) -> None:
    """Of this process three pages are used; a rendering may take 2 GiB more, but never more than there was before."""
    asked: list[Any] = []
    monkeypatch.setattr(template_sandbox.Path, "read_text", lambda _: "3 2 1\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda *given: asked.append(given))
    with template_sandbox._bounded_memory():
        assert asked == [(resource.RLIMIT_AS, (limit, hard))]
    assert asked[1:] == [(resource.RLIMIT_AS, (soft, hard))]


def test_the_time_of_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds of processor time, in the main thread only; then the timer is off and the handler as before."""
    asked: list[Any] = []
    monkeypatch.setattr(template_sandbox.signal, "signal", lambda *given: asked.append(given) or "before")
    monkeypatch.setattr(template_sandbox.signal, "setitimer", lambda *given: asked.append(given))
    with template_sandbox._bounded_time():
        (number, interrupt), timer = asked
        assert number == signal.SIGVTALRM and timer == (signal.ITIMER_VIRTUAL, 5.0)
        with pytest.raises(template_sandbox.TooLong):
            interrupt(0, None)
    assert asked[2:] == [(signal.ITIMER_VIRTUAL, 0), (signal.SIGVTALRM, "before")]
    asked.clear()
    monkeypatch.setattr(template_sandbox.threading, "current_thread", lambda: "another")
    with template_sandbox._bounded_time():
        assert asked == []
    assert template_sandbox.LONGEST_TEMPLATE == 1_000_000


def test_characters_of_values() -> None:
    assert template_sandbox._num_characters({"ab": ["c", ("def", 5)], "x": None}) == 2 + 1 + 3 + 8 + 1 + 8


def played_template(blocks: list[str], generated: list[tuple[int, int]]) -> Any:
    """A template that writes these blocks, and notes these places."""

    @contextlib.contextmanager
    def tracker(_: list[str], places: list[tuple[int, int]]) -> Any:
        places += generated
        yield

    found: Any = object.__new__(template_sandbox.SandboxedTemplate)
    found._special_tokens, found._where = {"bos_token": "<s>"}, "where"
    environment = SimpleNamespace(activate_tracker=tracker)
    found._template = SimpleNamespace(environment=environment, generate=lambda **_: iter(blocks))
    return found


def test_a_rendering_has_its_blocks_in_order_and_an_end() -> None:
    """A million characters, and 64 for each character of the messages and tools, of which there are 9 here."""
    messages, tools = [{"role": "a"}], [{"b": "cde"}]
    longest = 1_000_000 + 64 * 9
    found = played_template(["x" * longest], [(5, 7), (3, 3), (1, 4), (300, int("300")), (9, 8)]).render(
        messages, tools, add_generation_prompt=False
    )
    assert len(found.text) == longest and found.generated == ((1, 4), (5, 7))
    with pytest.raises(ConfigError, match="output"):
        played_template(["x" * longest, "y"], []).render(messages, tools, add_generation_prompt=False)


def test_a_template_file_that_is_gone_has_no_content(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"abc")
    assert encoding._content(tmp_path / "there") == b"abc" and encoding._content(tmp_path / "gone") == b""


@pytest.mark.parametrize("error", [OSError("no /proc"), ValueError("not allowed")])
def test_a_system_without_limits_renders_without_them(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with template_sandbox._bounded_memory():
        rendered = True
    assert rendered


def test_which_added_tokens_are_control_tokens(tiny_tokenizer: Any) -> None:
    """Those that are special, and others if the template writes them; never what is blank."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    given = (("<end>", True), (" \n", True), ("inside", False), ("outside", False), ("\t", False))
    tokenizer.add_tokens([AddedToken(content, special=special) for content, special in given])
    known = set(TextEncoder(tiny_tokenizer).control)
    assert set(TextEncoder(tokenizer, "{{ 'inside' }}\t").control) == {*known, "<end>", "inside"}
    assert set(TextEncoder(tokenizer).control) == {*known, "<end>"}


def test_a_difference_is_shown_with_what_stands_around_it() -> None:
    """12 characters before it, and from it on 24."""
    found: Any = object.__new__(jinja_template._Conversation)
    found._encoder = SimpleNamespace(show=lambda text: text)
    same, one, other = "0123456789abcdefghij", "x" + "b" * 40, "y" + "c" * 40
    for first, second in ((one, other), (other, one)):
        with pytest.raises(ExampleProblem) as caught:
            found._check_beginning(same + first, "the first", same + second, "the second")
        assert caught.value.problem == (
            "the template does not write one conversation step by step: the first has "
            f"{'89abcdefghij' + first[:24]!r} where the second has {'89abcdefghij' + second[:24]!r} (character 21)"
        )
    with pytest.raises(ExampleProblem, match=r"'01234' where the second has '012' \(character 4\)"):
        found._check_beginning("01234", "the first", "012", "the second")
    found._check_beginning("012", "the first", "01234", "the second")


def test_the_first_200_characters_of_an_error_of_a_template() -> None:
    class TemplateError(Exception):
        """An error that a template raises itself."""

    first = "".join(chr(ord("a") + number % 26) for number in range(201))
    assert template_sandbox._first_line(ValueError(f"{first}\nmore")) == f"ValueError: {first[:200]}"
    assert template_sandbox._first_line(TemplateError(f"{first}\nmore")) == first[:200]
    assert template_sandbox._first_line(TemplateError("only one turn")) == "only one turn"
    assert template_sandbox._first_line(TemplateError()) == "TemplateError"
    assert template_sandbox._first_line(KeyError()) == "KeyError"


def test_values_that_are_no_json_are_a_problem_of_the_example() -> None:
    circle: list[object] = []
    circle.append(circle)
    for value in (circle, object(), {"a": {1, 2}}, {(1, 2): 3}):
        with pytest.raises(ExampleProblem, match="tools: not JSON: "):
            mixtral_form._json(value)
    assert mixtral_form._json({"ä": [1, None]}) == '{"ä": [1, null]}'

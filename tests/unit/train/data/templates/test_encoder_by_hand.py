"""Control tokens as text and as tokens, words and their tokenizers, in small parts."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers

from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates import text_encoder
from mixtral_run.train.data.templates.text_encoder import TextEncoder, texts_of
from mixtral_run.train.data.templates.word_cache import NORMALIZERS, gives_the_same_ids


def tokenizer_of(*control: str, plain: tuple[str, ...] = ()) -> Any:
    """Return a tokenizer of one id a letter from 0 on, then its control tokens, then other added tokens."""
    core = Tokenizer(models.BPE({each: number for number, each in enumerate("abcdefghijklmnopqrstuvwxyz<>|/")}, []))
    core.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in control])
    core.add_tokens([AddedToken(each, special=False, normalized=False) for each in plain])
    decoder = {core.token_to_id(each): AddedToken(each, special=each in control) for each in (*control, *plain)}
    return SimpleNamespace(backend_tokenizer=core, added_tokens_decoder=decoder, name_or_path="t")


@pytest.mark.parametrize("names", [(), ("<a>",), ("<a>", "<a>b"), ("<a>", "<a>b", "</s>")])
def test_stand_ins_of_control_tokens(names: tuple[str, ...]) -> None:
    """One character that names the token, from U+100000 or U+F0000 on, and filling to the length of its text."""
    encoder = TextEncoder(tokenizer_of(*names))
    assert list(encoder.control.items()) == [(name, 30 + number) for number, name in enumerate(names)]
    for number, name in enumerate(names):
        assert encoder._stand_in_of_text(name) == chr(0x100000 + number) + "\ufdd0" * (len(name) - 1)
        assert encoder._stand_in_of_token(name) == chr(0xF0000 + number) + "\ufdd0" * (len(name) - 1)
        hidden = encoder.hide(f"x{name}y")
        assert hidden == f"x{chr(0x100000 + number)}{chr(0xFDD0) * (len(name) - 1)}y"
        assert encoder.show(hidden) == f"x{name}y" and encoder.has_control(f"x{name}y")
    unused = f"a{chr(0x100000 + len(names))}\ufdd0b"
    assert encoder.show(unused) == encoder.hide(unused) == unused
    assert not encoder.has_control("abc") and not encoder.has_control("")


def test_a_control_token_is_text_or_itself() -> None:
    encoder = TextEncoder(tokenizer_of("<a>", "<a>b", plain=("cde", "fgh")), "{{ 'fgh' }}")
    a, ab, cde, fgh = 30, 31, 32, 33
    assert set(encoder.control) == {"<a>", "<a>b", "fgh"}
    # As text each letter has its own id; cde is no control token, and is always found.
    assert encoder.text_ids("x<a>b") == [23, 26, 0, 27, 1]
    assert encoder.text_ids("cde fgh".replace(" ", "")) == [cde, 5, 6, 7]
    ids, places = encoder.encode("<a>b<a>fghcdeb", hidden=False)
    assert ids == [ab, a, fgh, cde, 1] and places == [(0, 4), (4, 7), (7, 10), (10, 13), (13, 14)]
    ids, places = encoder.encode(encoder.hide("fgh") + "<a>b<a>fghcdeb", hidden=True)
    assert ids == [5, 6, 7, ab, a, fgh, cde, 1]
    assert places == [(0, 1), (1, 2), (2, 3), (3, 7), (7, 10), (10, 13), (13, 16), (16, 17)]
    many = encoder.encode("<a>" * 300 + encoder.hide("<a>"), hidden=True)
    assert many[0] == [a] * 300 + [26, 0, 27] and many[1][299] == (897, 900)
    for text in ("\U000f0000\ufdd0\ufdd0", "a\U000f0001\ufdd0\ufdd0\ufdd0"):
        with pytest.raises(ExampleProblem, match="plane 15"):
            encoder.text_ids(text)
        with pytest.raises(ExampleProblem, match="does not find all those around it"):
            encoder.encode(text, hidden=True)
    assert encoder.is_added(a, " <a> ") and not encoder.is_added(a, "<a>b") and not encoder.is_added(0, "a")


def test_an_added_token_with_another_id_in_the_copy_keeps_its_own(tiny_tokenizer: Any) -> None:
    """Stand-ins are not in the vocabulary, so that their ids, and those of tokens behind them, are others there."""
    encoder = TextEncoder(tiny_tokenizer)
    end = tiny_tokenizer.eos_token_id
    copied_end: Any = encoder._as_text.token_to_id(encoder._stand_in_of_token("</s>"))
    assert copied_end != end and encoder._ids[copied_end] == end
    assert encoder.encode("</s>", hidden=True)[0] == encoder.encode("</s>", hidden=False)[0] == [end]
    assert all(copied != own for copied, own in encoder._ids.items())


def test_words_are_used_but_for_texts_with_other_added_tokens() -> None:
    vocabulary = {each: number for number, each in enumerate(["<unk>", "▁", "a", "b", "</s>", "▁a", "日"])}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.add_special_tokens([AddedToken("</s>", normalized=False)])
    core.add_tokens([AddedToken("<x>", normalized=False)])
    added = {4: AddedToken("</s>", special=True), 7: AddedToken("<x>")}
    encoder = TextEncoder(SimpleNamespace(backend_tokenizer=core, added_tokens_decoder=added))  # type: ignore[arg-type]
    assert encoder._words is not None
    assert encoder.text_ids("a <x> b") == [5, 1, 7, 1, 1, 3] and not encoder._words._words
    assert encoder.text_ids("ab </s> 日") == [5, 3, 1, 0, 1, 6]
    assert list(encoder._words._words) == ["▁ab", "▁</s>", "▁日"]


@pytest.mark.parametrize("error", [TypeError("x"), UnicodeEncodeError("utf-8", "x", 0, 1, "y")])
def test_a_text_that_is_no_unicode(error: Exception) -> None:
    def refuse(_: str, *, add_special_tokens: bool) -> None:
        assert add_special_tokens is False
        raise error

    with pytest.raises(ExampleProblem) as caught:
        text_encoder._encoded(SimpleNamespace(encode=refuse), "é\ud83d")  # type: ignore[arg-type]
    assert caught.value.problem == r"a text cannot be written as UTF-8: '\xe9\ud83d'"


def test_all_texts_of_values() -> None:
    given = {"a": ["b", ("c", 3, None)], "d": {"e": "f", "g": {}}, "h": "i"}
    assert list(texts_of(given)) == ["b", "c", "f", "i"]
    assert list(texts_of("x")) == ["x"] and list(texts_of([])) == list(texts_of(3)) == []


FITTING: dict[str, dict[str, Any]] = {
    "model": {"type": "BPE", "vocab": {"▁": 0, "a": 1, "▁▁": 2, "▁a": 3}},
    "normalizer": {"normalizers": NORMALIZERS},
}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"type": "ABC"}, False),
        ({"type": "Unigram"}, False),
        ({"vocab": {"a": 1}}, False),
        ({"vocab": {"▁": 0, "a▁": 1}}, False),
        ({"vocab": {"▁": 0, "日▁b": 1}}, False),
        ({"dropout": 0.1}, False),
        ({"continuing_subword_prefix": "##"}, False),
        ({"end_of_word_suffix": "</w>"}, False),
        ({"ignore_merges": True}, False),
        ({"ignore_merges": False, "dropout": None}, True),
    ],
)
def test_where_words_have_the_ids_of_the_text(change: dict[str, Any], same: bool) -> None:
    assert gives_the_same_ids(json.dumps(FITTING | {"model": FITTING["model"] | change})) is same

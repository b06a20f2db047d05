"""Ids of texts from those of their words: equal to the tokenizer's own, or not used."""

import json
import random
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import Tokenizer

from mixtral_run.train.data.templates.text_encoder import TextEncoder
from mixtral_run.train.data.templates.word_cache import WordCache, gives_the_same_ids
from tests.support.mistral_tokenizers import hf_tokenizer

PARTS = [
    " ", "  ", "   ", "\n", "\t", "▁", "▁▁", "a", "é", "日本", "😀", "the", "ing", "</s>", "[INST]", "\u200b", "\xa0",
    ".", "12", "_", "\ud7ff", "क्षि", "\x00", "<unk>", "<0x0A>", "<s>", "\U000f0001", "\U00100000", "\ufdd0",
]  # fmt: skip


def texts(count: int) -> list[str]:
    numbers = random.Random(3)
    english = " ".join(topics.values())
    found = ["".join(numbers.choices(PARTS, k=numbers.randrange(40))) for _ in range(count)]
    return [*found, "", " ", "x" * 300, *(english[begin : begin + 700] for begin in range(0, len(english) - 700, 3000))]


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mixtrals_tokenizers_give_the_same_ids(version: str) -> None:
    encoder = TextEncoder(hf_tokenizer(version))
    assert gives_the_same_ids(encoder.definition)
    whole = Tokenizer.from_str(encoder.definition)
    # A special token in a text is a token for the tokenizer itself; the encoder takes it as text.
    as_text = {token: f"{token[0]}\x01{token[1:]}" for token in encoder.control}
    by_words = WordCache(encoder.definition)
    for text in texts(3000):
        apart = text
        for token, other in as_text.items():
            apart = apart.replace(token, other)
        expected = whole.encode(apart, add_special_tokens=False).ids
        assert by_words.text_ids(apart) == expected, apart
        assert by_words.text_ids(apart) == expected, "the second time from the cache"
        if not any(character >= "\U000f0000" for character in apart):
            assert encoder.text_ids(apart) == expected


def test_the_encoder_uses_it_only_for_texts_without_added_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(hf_tokenizer("v1"))
    expected = {text: encoder._as_text.encode(text, add_special_tokens=False).ids for text in ("a </s> b", "a b")}
    assert all(encoder.text_ids(text) == ids for text, ids in expected.items())
    used: list[str] = []
    assert encoder._words is not None
    monkeypatch.setattr(encoder._words, "text_ids", lambda text: used.append(text) or [])
    encoder.text_ids("a b")
    encoder.text_ids("a\U00100000b")
    assert used == ["a b"]


@pytest.fixture(scope="module")
def definition() -> str:
    return TextEncoder(hf_tokenizer("v1")).definition


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": None},
        {"model": {"dropout": 0.1}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"model": {"type": "Unigram"}},
        {"vocab": {"of▁the": 32000}},
    ],
)
def test_other_tokenizers_are_left_to_themselves(definition: str, change: dict[str, Any]) -> None:
    values = json.loads(definition)
    vocabulary = values["model"]["vocab"] | change.pop("vocab", {})
    values["model"] |= change.pop("model", {}) | {"vocab": vocabulary}
    assert not gives_the_same_ids(json.dumps(values | change))

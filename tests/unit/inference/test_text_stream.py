"""Text of an answer while its tokens arrive."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from mixtral_run.inference.answers import Answer
from mixtral_run.inference.delivery import Delivery
from mixtral_run.inference.text_stream import TextStream
from mixtral_run.trial.tiny_tokenizer import train_tokenizer

TEXTS = (
    "  Grüße aus Köln: 12 € für 3 Äpfel.\n", "日本語のテキスト 👩‍👩‍👧 and more", "plain words only", "ends in ü",
    "\n\n  indented\n\ttab\n", "🇩🇪🇫🇷", "a", "é" * 40,
)  # fmt: skip


class _Decoding:
    """STAND-IN for a tokenizer of Transformers, whose `decode` is the one of `tokenizers` in a method."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _byte_level() -> Tokenizer:
    return train_tokenizer(["words of a text only in English"], 300)


def _byte_fallback() -> Tokenizer:
    """A vocabulary as SentencePiece's of Mixtral: blanks are ▁, and characters that it lacks are bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "ü",
        *"bcdefghijklmnopqrstuvwxyz",
    ]
    tokenizer = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("tokenizer", [_byte_level(), _byte_fallback()], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_parts_are_the_text_and_never_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = TextStream(_Decoding(tokenizer), {2})  # type: ignore[arg-type]
    parts = [stream.more(ids[:count]) for count in range(1, len(ids) + 1)]
    parts.append(stream.more([*ids, 2], ended=True))
    assert "".join(parts) == text.strip()
    assert "\ufffd" not in "".join(parts)
    if len(ids) > 8:
        assert sum(bool(part) for part in parts) > 3, "the text arrives in parts"


def test_an_end_inside_a_character_is_shown_as_the_tokenizer_decodes_it() -> None:
    tokenizer = _byte_level()
    ids = tokenizer.encode("é€", add_special_tokens=False).ids[:-1]
    stream = TextStream(_Decoding(tokenizer), {2})  # type: ignore[arg-type]
    parts = [stream.more(ids[:count]) for count in range(1, len(ids) + 1)]
    assert "".join(parts) == "é"
    assert stream.more(ids, ended=True) == "\ufffd"


class _Terminal:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> None:
        self.parts.append(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("seed", range(20))
def test_answers_come_in_order_and_the_first_incomplete_one_is_shown_live(seed: int) -> None:
    """Rows of a batch end at random; whatever the order, each is shown whole, one after the other."""
    tokenizer = _byte_level()
    texts = ["one two", "drei für fünf", "quatre à 5 €", "x"]
    rows = [[*tokenizer.encode(text, add_special_tokens=False).ids, 2] for text in texts]
    draw = random.Random(seed)
    terminal, delivered = _Terminal(), list[tuple[int, Answer]]()
    delivery = Delivery(
        [f"Q{number}" for number in range(4)], _Decoding(tokenizer), {2}, terminal,  # type: ignore[arg-type]
        lambda number, answer: delivered.append((number, answer)),
    )  # fmt: skip
    lengths = [0] * 4
    while lengths != [len(row) for row in rows]:
        lengths = [min(len(row), length + draw.choice((0, 1, 3))) for length, row in zip(lengths, rows, strict=True)]
        outputs = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        delivery.passed(0, outputs, [length < len(row) for length, row in zip(lengths, rows, strict=True)])
    expected = "".join(f"\n> Q{number}\n{text}\n" for number, text in enumerate(texts))
    assert "".join(terminal.parts) == expected
    assert [number for number, _ in delivered] == [0, 1, 2, 3]
    assert [answer.text for _, answer in delivered] == texts
    assert [answer.num_tokens for _, answer in delivered] == [len(row) for row in rows]
    assert all(answer.finished for _, answer in delivered)

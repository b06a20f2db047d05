"""Make the content of tokenizer.json from tokenizer.model, so that both encode a text alike. Standard library only.

tokenizer.model is a protocol buffer (sentencepiece_model.proto). A byte-pair model merges the neighbors that make up
the piece of the highest score; tokenizer.json lists the same merges in the order of that score. Everything that would
encode a text in another way than Mistral AI's models do is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Types of pieces in sentencepiece_model.proto."""
_BYTE_PAIRS = 2
_SPACE = "▁"
_NORMALIZER: dict[str, Any] = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
_DECODER: dict[str, Any] = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


class NotReadableError(ValueError):
    """The file is not a SentencePiece model, or not one that tokenizer.json can express exactly."""


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    type: int


def tokenizer_json(path: Path, added: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return the content of the tokenizer.json that encodes as the SentencePiece model at `path`.

    added: further special tokens and their ids. Raises NotReadableError, or OSError.
    """
    pieces = _read(path.read_bytes())
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise NotReadableError("two pieces have the same text")
    special = {piece.text: vocabulary[piece.text] for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)}
    _check_added(added or {}, vocabulary)
    unknown = next((piece.text for piece in pieces if piece.type == _UNKNOWN), None)
    begin = "<s>" if "<s>" in special else None
    prefix = [{"SpecialToken": {"id": begin, "type_id": 0}}] if begin else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, number in sorted({**(added or {}), **special}.items(), key=lambda item: item[1])
        ],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*prefix, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*prefix, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [special[begin]], "tokens": [begin]}} if begin else {},
        },
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == _BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(pieces, vocabulary),
        },
    }


def _check_added(added: Mapping[str, int], vocabulary: Mapping[str, int]) -> None:
    """Raise NotReadableError unless the added tokens have the ids that follow the model's, without gaps."""
    new = {text: number for text, number in added.items() if text not in vocabulary}
    wrong = [f"{text!r} has id {number}" for text, number in added.items() if vocabulary.get(text, number) != number]
    expected = range(len(vocabulary), len(vocabulary) + len(new))
    if wrong or sorted(new.values()) != list(expected):
        found = ", ".join(wrong or [f"{text!r} {number}" for text, number in list(new.items())[:3]])
        raise NotReadableError(f"the ids of added tokens do not follow the model's {len(vocabulary)}: {found}")


def _merges(pieces: list[_Piece], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Return all pairs of pieces that make up a piece, the pair of the highest score first."""
    plain = {piece.text for piece in pieces if piece.type == _NORMAL}
    found = []
    for piece in sorted((each for each in pieces if each.type == _NORMAL), key=lambda each: -each.score):
        pairs = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        pairs = [pair for pair in pairs if pair[0] in plain and pair[1] in plain]
        found += [[*pair] for pair in sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))]
    return found


def _read(content: bytes) -> list[_Piece]:
    try:
        fields = list(_fields(content))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(next((value for number, value in fields if number == 2), b"")))
        rules = dict(_fields(next((value for number, value in fields if number == 3), b"")))
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise NotReadableError("it is damaged, or not a SentencePiece model") from error
    if not pieces:
        raise NotReadableError("it has no pieces: it is damaged, or not a SentencePiece model")
    expected = {
        "a byte-pair model": trainer.get(3, 1) == _BYTE_PAIRS,
        "no normalization of characters": not rules.get(2),
        "a space before a text": bool(rules.get(3, 1)),
        "spaces that stay as they are": not rules.get(4, 1),
        "spaces written as ▁": bool(rules.get(5, 1)) and not trainer.get(24, 0),
    }
    odd = sorted({piece.type for piece in pieces} - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE})
    missing = [name for name, holds in expected.items() if not holds]
    if missing or odd:
        missing += [f"no pieces of type {each}" for each in odd]
        raise NotReadableError(f"a model as Mistral AI's has {', '.join(missing)}; this one is different")
    return pieces


def _piece(content: Any) -> _Piece:
    values = dict(_fields(content))
    return _Piece(values[1].decode("utf-8"), float(values.get(2, 0.0)), int(values.get(3, _NORMAL)))


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protocol buffer: an integer, a float, or bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, kind = key >> 3, key & 7
        value: Any
        if kind == 0:
            value, place = _varint(content, place)
        elif kind == 5:
            (value,) = struct.unpack_from("<f", content, place)
            place += 4
        elif kind == 1:
            (value,) = struct.unpack_from("<d", content, place)
            place += 8
        elif kind == 2:
            length, place = _varint(content, place)
            value = content[place : place + length]
            if len(value) < length:
                raise IndexError("the file ends within a field")
            place += length
        else:
            raise IndexError("no protocol buffer")
        yield number, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise IndexError("no protocol buffer")

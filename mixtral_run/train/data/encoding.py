"""The way from an example to token ids, in a form that the processes that tokenize can load for themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mixtral_run.train.data.encoded import EncodedExample
from mixtral_run.train.data.examples import Example
from mixtral_run.train.data.prompt import encode_conversation, load_tokenizer
from mixtral_run.weights.hf.tokenizer_files import TOKENIZER_FILES

Encode = Callable[[Example], EncodedExample]


@dataclass(frozen=True)
class Encoding:
    """Tokenizer and chat template. tokenizer_folder: of the tokenizer's files."""

    tokenizer_folder: Path

    def load(self) -> Encode:
        """Return the function that encodes an example."""
        tokenizer = load_tokenizer(self.tokenizer_folder)

        def encode(example: Example) -> EncodedExample:
            row: list[int] = []
            learned = []
            turns = encode_conversation(tokenizer, example.turns)
            for (prompt, answer), counts in zip(turns, example.learned or [True] * len(turns), strict=True):
                begin = len(row) + len(prompt)
                row += prompt + answer
                learned += [(begin, len(row))] if counts else []
            return EncodedExample(np.asarray(row, np.int32), tuple(learned))

        return encode

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the token ids; no tokenizer is loaded."""
        digest = hashlib.sha256(f"tokenizers {version('tokenizers')}\n".encode())
        for name in TOKENIZER_FILES:
            file = self.tokenizer_folder / name
            if file.is_file():
                digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()


def content_digest(example: Example) -> int:
    """Return a hash of 64 bits of an example's texts. It depends on nothing else, so that duplicates share it."""
    digest = hashlib.sha256(json.dumps(example.turns, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "little")


def place_of(example: Example) -> str:
    """Return where an example stands in its file."""
    return f"line {example.line}"

"""Samples of a few examples in memory, without a token cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixtral_run.train.data.encoded import EncodedExample
from mixtral_run.train.data.examples import Example
from mixtral_run.train.data.prompt import encode_conversation
from mixtral_run.train.data.samples import Samples
from mixtral_run.train.data.token_arrays import TokenArrays


def encode(tokenizer: Any, example: Example) -> EncodedExample:
    row: list[int] = []
    learned = []
    turns = encode_conversation(tokenizer, example.turns)
    for (prompt, answer), counts in zip(turns, example.learned or [True] * len(turns), strict=True):
        begin = len(row) + len(prompt)
        row += prompt + answer
        learned += [(begin, len(row))] if counts else []
    return EncodedExample(np.asarray(row, np.int32), tuple(learned))


def samples_of(examples: Sequence[Example], tokenizer: Any, seq_length: int, where: str | None = None) -> Samples:
    """Return the examples as samples, as a training run would get them."""
    places = [f"line {example.line}" for example in examples]
    arrays = TokenArrays.of(places, [encode(tokenizer, example) for example in examples])
    return Samples(arrays, seq_length, tokenizer.eos_token_id, where)

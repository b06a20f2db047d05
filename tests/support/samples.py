"""Samples of a few examples in memory, without a token cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixtral_run.train.data.example import Example
from mixtral_run.train.data.instruct_encoding import encode
from mixtral_run.train.data.samples import Samples
from mixtral_run.train.data.token_arrays import TokenArrays


def samples_of(examples: Sequence[Example], tokenizer: Any, seq_length: int, where: str | None = None) -> Samples:
    """Return the examples as samples, as a training run would get them."""
    arrays = TokenArrays.of([each.place for each in examples], [encode(tokenizer, each) for each in examples])
    return Samples(arrays, seq_length, tokenizer.eos_token_id, where)

"""Tokens and samples of a few examples in memory, without a token cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from mixtral_run.config.data import MIXTRAL_TEMPLATE
from mixtral_run.train.data.cache.token_arrays import TokenArrays
from mixtral_run.train.data.reading.example import USER, Example, Message
from mixtral_run.train.data.samples import Samples
from mixtral_run.train.data.templates.chat_template import ChatTemplate
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.data.templates.open_template import open_chat_template
from tests.support.examples import conversation


@cache
def instruct_form(tokenizer: Any) -> ChatTemplate:
    return open_chat_template(MIXTRAL_TEMPLATE, tokenizer)


def samples_of(examples: Sequence[Example], tokenizer: Any, seq_length: int, where: str | None = None) -> Samples:
    """Return the examples as samples, as a training run would get them."""
    arrays = TokenArrays.of([each.place for each in examples], map(instruct_form(tokenizer).encode, examples))
    return Samples(arrays, seq_length, tokenizer.eos_token_id, where)


def prompt_tokens(tokenizer: Any, instruction: str) -> list[int]:
    """Return the prompt of generation."""
    return instruct_form(tokenizer).prompt([Message(USER, instruction)])


def encode_turn(tokenizer: Any, instruction: str, response: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, and those of its response with </s>."""
    (turn,) = encode_conversation(tokenizer, [(instruction, response)])
    return turn


def encode_conversation(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of the prompt and of the response of each turn."""
    encoded = instruct_form(tokenizer).encode(conversation(*(text for turn in turns for text in turn)))
    tokens, found, start = encoded.tokens.tolist(), [], 0
    for begin, end in encoded.learned:
        found.append((tokens[start:begin], tokens[begin:end]))
        start = end
    return found


def arrays_by_hand(
    *examples: tuple[Sequence[int], Sequence[tuple[int, int]]], rows_each: int = 1, digests: Sequence[int] = ()
) -> TokenArrays:
    """Return examples that are written as tokens and learned spans. rows_each: consecutive ones from one line."""
    encoded = [EncodedExample(np.asarray(tokens, np.int32), tuple(spans)) for tokens, spans in examples]
    return TokenArrays.of([f"line {number // rows_each + 1}" for number in range(len(examples))], encoded, digests)

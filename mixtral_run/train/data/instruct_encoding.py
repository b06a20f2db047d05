"""Encoding of an example in Mixtral-Instruct's form, with the functions of prompt.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.encoded import EncodedExample
from mixtral_run.train.data.example import ASSISTANT, SYSTEM, TOOL, Example
from mixtral_run.train.data.prompt import encode_conversation, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """Return the tokens of an example. A system message is put before the first message of the user.

    Raises ConfigError for calls of tools, which this form does not have.
    """
    if example.text is not None:
        tokens = encode_text(tokenizer, example.text)
        return EncodedExample(np.asarray(tokens, np.int32), ((1, len(tokens)),))
    if example.tools or any(message.role == TOOL or message.tool_calls for message in example.messages):
        raise ConfigError("the example calls tools, which the chat template does not have", where=example.place)
    messages = list(example.messages)
    system = messages.pop(0).content.strip() if messages[0].role == SYSTEM else ""
    texts = [message.content for message in messages]
    if system:
        texts[0] = f"{system}\n\n{texts[0].strip()}"
    row: list[int] = []
    learned = []
    turns = encode_conversation(tokenizer, list(zip(texts[::2], texts[1::2], strict=True)))
    answers = [message for message in messages if message.role == ASSISTANT]
    for (prompt, answer), message in zip(turns, answers, strict=True):
        begin = len(row) + len(prompt)
        row += prompt + answer
        learned += [(begin, len(row))] if message.learned else []
    return EncodedExample(np.asarray(row, np.int32), tuple(learned))

"""Examples as text, with the parts that count in the loss and the control tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.templates.encoded import EncodedExample

Decode = Callable[[list[int]], str]
_CONTEXT = 16
"""Tokens before a part with which it is decoded."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a rendered example.

    Attributes:
        text: as the tokenizer decodes it.
        learned: its tokens count in the loss.
        control: it is one control token, and no text of the data.
    """

    text: str
    learned: bool
    control: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as it is trained on.

    Attributes:
        place: where it stands in the data.
        parts: its text.
        ids: token ids; empty without a tokenizer.
        mask: for each id 1 if it counts in the loss, else 0.
    """

    place: str
    parts: tuple[Part, ...]
    ids: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()


def rendered_messages(example: Example) -> Rendered:
    """Return an example by its messages, where there are no tokens."""
    if example.text is not None:
        return Rendered(example.place, (Part(example.text, True),))
    parts = []
    for message in example.messages:
        calls = f" {json.dumps(list(message.tool_calls), default=str)}" if message.tool_calls else ""
        learned = message.role == "assistant" and message.learned
        parts += [Part(f"{message.role}: ", False), Part(message.content + calls, learned), Part("\n", False)]
    return Rendered(example.place, tuple(parts[:-1]))


def rendered_example(place: str, encoded: EncodedExample, decode: Decode, control_ids: Collection[int]) -> Rendered:
    """Return an example by its tokens, with ids and mask."""
    tokens = encoded.tokens.tolist()
    mask = [0] * len(tokens)
    for begin, end in encoded.learned:
        mask[begin:end] = [1] * (end - begin)
    found = rendered_tokens(place, tokens, encoded.learned, decode, control_ids)
    return Rendered(place, found.parts, tuple(tokens), tuple(mask))


def rendered_tokens(
    place: str,
    tokens: list[int],
    learned: Sequence[tuple[int, int]],
    decode: Decode,
    control_ids: Collection[int] = frozenset(),
) -> Rendered:
    """Return the text of tokens, with the parts that are learned.

    Args:
        place: where the example stands in the data.
        tokens: its ids.
        learned: begin and end of each span.
        decode: gives the text of tokens.
        control_ids: ids that become parts of their own.
    """
    is_learned = [False] * len(tokens)
    for begin, end in learned:
        is_learned[begin:end] = [True] * (end - begin)
    control = [number in control_ids for number in tokens]
    borders = [
        at
        for at in range(len(tokens) + 1)
        if at in (0, len(tokens)) or is_learned[at] != is_learned[at - 1] or control[at] or control[at - 1]
    ]
    borders = sorted({*borders, *(begin for begin, _ in learned)})
    parts = [
        Part(_text_of(tokens, begin, end, decode), is_learned[begin], control[begin])
        for begin, end in itertools.pairwise(borders)
    ]
    return Rendered(place, tuple(parts))


def _text_of(tokens: list[int], begin: int, end: int, decode: Decode) -> str:
    """Return the text of tokens [begin, end) as it stands behind those before them.

    Decoders drop the space before a first word. A few tokens before are enough to keep it; all of them would take a
    time that grows with the square of the length.
    """
    start = max(begin - _CONTEXT, 0)
    before, after = decode(tokens[start:begin]), decode(tokens[start:end])
    return after[len(before) :] if after.startswith(before) else decode(tokens[begin:end])

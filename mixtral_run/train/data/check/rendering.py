"""Examples as text, with the parts that count in the loss and the control tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.templates.encoded import EncodedExample

Decode = Callable[[list[int]], str]


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
    # Text up to a border, less the text up to the one before: decoders drop the space before a first word.
    texts = [decode(tokens[:border]) for border in borders]
    cuts = list(zip(texts, texts[1:], borders, borders[1:], strict=False))
    parts = [
        Part(
            after[len(before) :] if after.startswith(before) else decode(tokens[begin:end]),
            is_learned[begin],
            control[begin],
        )
        for before, after, begin, end in cuts
    ]
    return Rendered(place, tuple(parts))

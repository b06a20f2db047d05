"""Examples in the short form that tests write them in."""

from __future__ import annotations

from pathlib import Path

from mixtral_run.train.data.reading.example import ASSISTANT, USER, Example, Message
from mixtral_run.train.data.reading.examples import read_examples


def examples_of(path: Path) -> list[Example]:
    return list(read_examples([str(path)]))


def conversation(*texts: str, place: str = "line 1") -> Example:
    """The user and the assistant in turn."""
    roles = (USER, ASSISTANT) * len(texts)
    return Example(
        place, tuple(Message(role, text, role == ASSISTANT) for role, text in zip(roles, texts, strict=False))
    )


def turns_of(example: Example) -> list[tuple[str, str]]:
    """Instruction and response of each turn."""
    texts = [message.content for message in example.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))

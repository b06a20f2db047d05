"""Texts of the data that spell a control token, or a marker that a chat template writes as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates.chat_template import ChatTemplate
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.data.templates.text_encoder import mapped, texts_of

AS_TEXT, AS_TOKEN, AS_MARKER = "text", "control token", "marker of the template"
_NOTHING = "(?!)"


class SpelledTokens:
    """Finds control tokens and markers in the texts of examples, and how they are encoded there.

    template: the chat template of the run.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._control_ids = template.control_ids
        self._control = _any_of(template.control)
        self._any = _any_of([*template.control, *template.text_markers])

    def find(self, example: Example, encoded: EncodedExample) -> dict[str, str]:
        """Return the tokens and markers that the example's texts spell, with how each is encoded.

        AS_TEXT: the letters. AS_TOKEN: the token itself, which no template of the kit does. AS_MARKER: the template
        writes the marker as text itself, so that the model cannot tell the two apart.
        """
        names = {found[0] for text in _texts(example) for found in self._any.finditer(text)}
        spelled = {name for name in names if self._control.fullmatch(name)}
        how = AS_TOKEN if spelled and self._become_tokens(example, encoded) else AS_TEXT
        return {name: how if name in spelled else AS_MARKER for name in sorted(names)}

    def _become_tokens(self, example: Example, encoded: EncodedExample) -> bool:
        """Return True if the example has other control tokens than one whose texts do not spell any."""
        try:
            other = self._template.encode(_changed(example, lambda text: self._control.sub("x", text)))
        except ExampleProblem:
            return False
        return self._tokens(encoded) != self._tokens(other)

    def _tokens(self, encoded: EncodedExample) -> list[int]:
        return [number for number in encoded.tokens.tolist() if number in self._control_ids]


def _any_of(names: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or _NOTHING)


def _texts(example: Example) -> Iterator[str]:
    if example.text is not None:
        yield example.text
    for message in example.messages:
        yield message.content
        yield from texts_of(message.tool_calls)
    yield from texts_of(example.tools)


def _changed(example: Example, change: Callable[[str], str]) -> Example:
    """Return an example with `change` applied to its texts."""

    def message(given: Message) -> Message:
        return replace(given, content=change(given.content), tool_calls=mapped(given.tool_calls, change))

    return replace(
        example,
        messages=tuple(map(message, example.messages)),
        text=None if example.text is None else change(example.text),
        tools=mapped(example.tools, change),
    )

"""One training example: a conversation, or a plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

SYSTEM, USER, ASSISTANT, TOOL = ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of ROLES.
        content: the text as it stands in the data. Empty where an assistant's message only calls tools.
        learned: for the assistant's messages: True if the message counts in the loss.
        tool_calls: calls of functions by the assistant, each {"id", "type", "function": {"name", "arguments"}}.
        tool_call_id: for a tool's message: the id of the call that it answers.
        name: for a tool's message: the name of the function.
    """

    role: str
    content: str
    learned: bool = True
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: `messages`, or `text` of which every token is learned.

    Attributes:
        place: where the example stands, for errors: "line 12", or "row 12 of FILE".
        messages: the conversation in its order. Empty for a plain text.
        text: a plain text for continued pre-training; None for a conversation.
        tools: functions that the assistant may call, as JSON schemas.
        rejected: of preferences: the conversation with the rejected answer; `messages` has the chosen one.
        label: of preferences with one answer: True if it is desirable.
    """

    place: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Message, ...] | None = None
    label: bool | None = None

    def answers(self) -> tuple[Example | None, ...]:
        """Return the examples to encode: itself, or the chosen and the rejected answer; None for a missing one."""
        if self.rejected is not None:
            return Example(self.place, self.messages, None, self.tools), Example(
                self.place, self.rejected, None, self.tools
            )
        if self.label is not None:
            alone = Example(self.place, self.messages, None, self.tools)
            return (alone, None) if self.label else (None, alone)
        return (self,)

    def named_answers(self) -> tuple[Example, ...]:
        """Return `answers` without None, with the kind of each answer of a preference after its place."""
        if self.rejected is None and self.label is None:
            return (self,)
        names = ("chosen", "rejected") if self.rejected is not None else ("desirable", "undesirable")
        return tuple(
            replace(each, place=f"{self.place}, {name}")
            for each, name in zip(self.answers(), names, strict=True)
            if each is not None
        )

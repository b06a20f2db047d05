"""The state of a chat: messages, system prompt, and the turns that fit into the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, USER, Message
from mixtral_run.train.data.templates.chat_template import ChatTemplate

_RESERVED_SHARE = 4
"""At least one token in so many of the context is left for an answer, however long the prompt is."""


@dataclass(frozen=True)
class Question:
    """A prompt for the model. num_dropped: turns that were left out for it. room: most tokens of the answer."""

    row: tuple[int, ...]
    room: int
    num_dropped: int


@dataclass
class Conversation:
    """Messages between a user and the assistant.

    template: the chat template of the model. context: most tokens of a prompt with its answer. max_new_tokens: most
    tokens of an answer. system: the system prompt, empty for none.
    """

    template: ChatTemplate
    context: int
    max_new_tokens: int
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Questions and answers, oldest first."""

    def ask(self, text: str) -> Question:
        """Return the prompt for a question after the turns so far. The oldest turns that do not fit are removed.

        Raises:
            ConfigError: the question alone does not fit, or the template cannot take the conversation.
        """
        least = min(self.max_new_tokens, max(1, self.context // _RESERVED_SHARE))
        first = 0
        while True:
            row = self.template.prompt(self._messages(self.turns[first:], text))
            room = self.context - len(row)
            if room >= least:
                break
            if first == len(self.turns):
                raise ConfigError(
                    "The message is too long for the model's context.",
                    expected=f"at most {self.context - least:,} tokens, with {least:,} left for the answer",
                    found=f"{len(row):,} tokens",
                )
            first += 1
        del self.turns[:first]
        return Question(tuple(row), min(room, self.max_new_tokens), first)

    def add(self, question: str, answer: str) -> None:
        """Keep a turn."""
        self.turns.append((question, answer))

    def _messages(self, turns: Sequence[tuple[str, str]], text: str) -> list[Message]:
        found = [Message(SYSTEM, self.system, learned=False)] if self.system else []
        for question, answer in turns:
            found += [Message(USER, question, learned=False), Message(ASSISTANT, answer)]
        return [*found, Message(USER, text, learned=False)]

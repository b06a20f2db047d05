"""Chat templates: conversations to token ids, with the spans that are learned.

Training, `data check` and generation share one template, so that a prompt has the same tokens in all of them. There are
two kinds: Mixtral-Instruct's form (mixtral_form.py), and Jinja templates as Transformers renders them
(jinja_template.py).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mixtral_run.train.data.reading.example import ASSISTANT, USER, Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.data.templates.text_encoder import TextEncoder
from mixtral_run.weights.manifest.template_record import TemplateRecord

MIXTRAL = "mixtral"
"""Name of Mixtral-Instruct's form."""


class ChatTemplate(ABC):
    """A chat template with the tokenizer that it is for. record: name and texts of the template."""

    def __init__(self, record: TemplateRecord, encoder: TextEncoder, bos_id: int, eos_id: int) -> None:
        self.record = record
        self._encoder, self._bos_id, self._eos_id = encoder, bos_id, eos_id

    @property
    def name(self) -> str:
        """Return the template's name: MIXTRAL, "tokenizer" for a tokenizer's own, or the name of a file."""
        return self.record.name

    @property
    def control(self) -> Mapping[str, int]:
        """Return the control tokens and their ids."""
        return self._encoder.control

    @property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @property
    def text_markers(self) -> tuple[str, ...]:
        """Return the marks of turns that the template writes as plain text, as texts of the data can, too."""
        return ()

    @abstractmethod
    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids after which the assistant's next answer begins. Raises ExampleProblem."""

    @abstractmethod
    def describe(self) -> str:
        """Return one sentence about the template for the start of a run."""

    @abstractmethod
    def _encode_messages(self, example: Example) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a conversation and its learned spans."""

    def encode(self, example: Example) -> EncodedExample:
        """Return the tokens of an example and the learned spans.

        Of a conversation the assistant's messages are learned, each with the token that ends it. Of a plain text every
        token is learned, with the end of the text.

        Raises:
            ExampleProblem: the template cannot take the example, or nothing of it is learned.
        """
        try:
            if example.text is not None:
                ids = [self._bos_id, *self._encoder.text_ids(example.text), self._eos_id]
                spans = [(1, len(ids))]
            else:
                _check_turns(example.messages)
                ids, spans = self._encode_messages(example)
        except ExampleProblem as error:
            raise ExampleProblem(error.problem, example.place) from error
        learned = _disjoint([(max(1, begin), end) for begin, end in spans if end > max(1, begin)])
        if not learned:
            raise ExampleProblem("no token counts in the loss", example.place)
        return EncodedExample(np.asarray(ids, dtype=np.int32), learned)

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of template and tokenizer: of everything that decides the tokens of an example."""
        parts = [self.record.fingerprint, self._encoder.definition, json.dumps([self._bos_id, self._eos_id])]
        return hashlib.sha256("\0".join([*parts, *self._details()]).encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end an answer: the tokenizer's end of a text, and the template's end of a turn."""
        try:
            encoded = self.encode(_PROBE)
        except ExampleProblem:
            return frozenset({self._eos_id})
        return frozenset({self._eos_id, int(encoded.tokens[encoded.learned[-1][1] - 1])})

    def _details(self) -> list[str]:
        """Return whatever else decides the tokens."""
        return []


def _disjoint(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return spans of the same tokens in their order, of which none overlap: each token counts once in the loss."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return tuple(found)


_PROBE = Example("probe", (Message(USER, "Hello"), Message(ASSISTANT, "Hi")))


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise ExampleProblem unless the conversation ends with an answer and has one that is learned."""
    if not messages:
        raise ExampleProblem("the conversation has no messages")
    if messages[-1].role != ASSISTANT:
        raise ExampleProblem(f"the conversation ends with the {messages[-1].role}; expected an answer of the assistant")
    for number, message in enumerate(messages, start=1):
        if message.role == ASSISTANT and not message.content and not message.tool_calls:
            raise ExampleProblem(f"message {number}: the assistant's answer is empty")
    if not any(message.learned for message in messages if message.role == ASSISTANT):
        raise ExampleProblem("no answer counts in the loss: 'weight' 0 or 'train' false on every one")

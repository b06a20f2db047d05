"""Mixtral-Instruct's form: `<s>[INST] question [/INST] answer</s>`, and `[INST] …` again for each further turn.

The tokens equal those of Mistral's own mistral-common. Its tokenizer v1 (Mixtral 8x7B) writes `[INST]` as text, and
puts a system prompt before the first question. v3 (Mixtral 8x22B) has control tokens for `[INST]` and for tools, and
puts system prompt and tools before the last question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, TOOL, USER, Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.reading.json_values import read_json
from mixtral_run.train.data.templates.chat_template import MIXTRAL, ChatTemplate
from mixtral_run.train.data.templates.text_encoder import TextEncoder
from mixtral_run.weights.manifest.template_record import TemplateRecord

V3_TOKENS = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
_TOOL_KEYS, _FUNCTION_KEYS = {"type", "function"}, {"name", "description", "parameters", "strict"}
_CALL_ID = re.compile("[a-zA-Z0-9]{9}")


@dataclass(frozen=True)
class _Piece:
    """The ids of a message. learned: they count in the loss."""

    ids: list[int]
    learned: bool = False


class MixtralForm(ChatTemplate):
    """Mixtral-Instruct's form for a tokenizer.

    Args:
        encoder: its tokenizer decides between v1 and v3: v3 has the control tokens V3_TOKENS.
        bos_id: id of <s>.
        eos_id: id of </s>.
    """

    def __init__(self, encoder: TextEncoder, bos_id: int, eos_id: int) -> None:
        super().__init__(TemplateRecord(MIXTRAL), encoder, bos_id, eos_id)
        self.is_v3 = all(token in encoder.control for token in V3_TOKENS)
        # SentencePiece writes a blank before every text; other tokenizers need it in the text.
        self.adds_blank = encoder.text_ids("a") == encoder.text_ids("[/INST] a")[len(encoder.text_ids("[/INST]")) :]

    def describe(self) -> str:
        return f"{self.record.describe()}, as tokenizer {'v3' if self.is_v3 else 'v1'} of mistral-common writes it"

    @property
    def text_markers(self) -> tuple[str, ...]:
        return () if self.is_v3 else ("[INST]", "[/INST]")

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return [self._bos_id, *(number for piece in self._pieces(messages, tools) for number in piece.ids)]

    def _encode_messages(self, example: Example) -> tuple[list[int], list[tuple[int, int]]]:
        ids, spans = [self._bos_id], []
        for piece in self._pieces(example.messages, example.tools):
            if piece.learned:
                spans.append((len(ids), len(ids) + len(piece.ids)))
            ids += piece.ids
        return ids, spans

    def _details(self) -> list[str]:
        return ["v3" if self.is_v3 else "v1"]

    def _pieces(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[_Piece]:
        system = "\n\n".join(message.content for message in messages if message.role == SYSTEM and message.content)
        turns = list(_merged(messages))
        if not self.is_v3:
            yield from self._pieces_v1(turns, system, tools)
            return
        last_question = max(place for place, turn in enumerate(turns) if turn.role == USER)
        for place, turn in enumerate(turns):
            if turn.role == USER:
                is_last = place == last_question
                text = f"{system}\n\n{turn.content}" if system and is_last else turn.content
                shown = self._tools(tools) if tools and is_last else []
                yield _Piece([*shown, self._token("[INST]"), *self._encoder.text_ids(text), self._token("[/INST]")])
            elif turn.role == TOOL:
                result = self._encoder.text_ids(_json(_tool_result(turn)))
                yield _Piece([self._token("[TOOL_RESULTS]"), *result, self._token("[/TOOL_RESULTS]")])
            else:
                yield _Piece([*self._answer_v3(turn), self._eos_id], turn.learned)

    def _pieces_v1(self, turns: list[Message], system: str, tools: Sequence[Mapping[str, Any]]) -> Iterator[_Piece]:
        if tools or any(turn.tool_calls or turn.role == TOOL for turn in turns):
            raise ExampleProblem(
                "tools: Mixtral-Instruct's form has none for this tokenizer; a model with tools has its own template, "
                "or give one with --chat-template FILE"
            )
        question, first = "", True
        for turn in turns:
            if turn.role == USER:
                text = f"{system}\n\n{turn.content}" if system and first else turn.content
                question, first = f"[INST] {text} [/INST]", False
                yield _Piece(self._encoder.text_ids(question))
            else:
                yield _Piece([*self._answer_v1(question, turn.content), self._eos_id], turn.learned)
                question = ""

    def _answer_v1(self, question: str, answer: str) -> list[int]:
        """Return the ids of an answer: those that generation can produce after the question's."""
        if self.adds_blank:
            return self._encoder.text_ids(answer)
        before = self._encoder.text_ids(question)
        both = self._encoder.text_ids(f"{question} {answer}")
        # A tokenizer may merge across the end of the question. No generation could produce such a token.
        return both[len(before) :] if both[: len(before)] == before else self._encoder.text_ids(answer)

    def _answer_v3(self, turn: Message) -> list[int]:
        if turn.tool_calls and turn.content:
            raise ExampleProblem("an answer has a text and tool calls; Mixtral-Instruct's form has one of them")
        if not turn.tool_calls:
            return self._encoder.text_ids(turn.content.rstrip(" "))
        calls = _json([_tool_call(call) for call in turn.tool_calls])
        return [self._token("[TOOL_CALLS]"), *self._encoder.text_ids(calls)]

    def _tools(self, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        text = _json([_tool(tool) for tool in tools])
        return [self._token("[AVAILABLE_TOOLS]"), *self._encoder.text_ids(text), self._token("[/AVAILABLE_TOOLS]")]

    def _token(self, name: str) -> int:
        return self._encoder.control[name]


def _merged(messages: Sequence[Message]) -> Iterator[Message]:
    """Yield the turns: adjacent messages of one role are one, as for mistral-common; tools' results stay apart.

    Answers of which one is learned and the next is not stay apart, too. System messages are left out.
    """
    groups = groupby(messages, key=lambda message: (message.role, message.learned or message.role != ASSISTANT))
    started = False
    for (role, _), group in groups:
        several = list(group)
        if role == SYSTEM:
            continue
        if not started and role != USER:
            yield Message(USER, "")
        started = True
        if role == TOOL:
            yield from several
            continue
        content = "\n\n".join(message.content for message in several if message.content)
        calls = tuple(call for message in several for call in message.tool_calls)
        yield replace(several[0], content=content, tool_calls=calls)
    if not started:
        yield Message(USER, "")


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ExampleProblem(f"tools: not JSON: {error}") from error


def _parsed(text: object) -> Any:
    """Return the value of a JSON text, or the text itself; nothing is an empty object."""
    if not isinstance(text, str):
        return text
    try:
        return read_json(text or "{}")
    except ValueError:
        return text


def _call_id(number: object) -> str:
    if not isinstance(number, str) or _CALL_ID.fullmatch(number) is None:
        raise ExampleProblem(
            f"the id of a tool call: Mixtral-Instruct's form expects nine letters or digits; found {json.dumps(number)}"
        )
    return number


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ExampleProblem(f"tool calls: expected a function with a name; found {str(dict(call))[:80]}")
    arguments = _parsed(function.get("arguments") or "")
    return {"name": function["name"], "arguments": arguments, "id": _call_id(call.get("id"))}


def _tool_result(message: Message) -> dict[str, Any]:
    return {"content": _parsed(message.content), "call_id": _call_id(message.tool_call_id)}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping) or set(tool) - _TOOL_KEYS:
        raise ExampleProblem(f'tools: expected {{"type": "function", "function": …}}; found {str(dict(tool))[:80]}')
    if unknown := sorted(map(str, set(function) - _FUNCTION_KEYS)):
        raise ExampleProblem(f"tools: Mixtral-Instruct's form has no key {', '.join(map(repr, unknown))} of a function")
    if not isinstance(function.get("name"), str) or not isinstance(function.get("parameters"), Mapping):
        raise ExampleProblem("tools: expected 'name' and 'parameters' of a function")
    described = function.get("description") or ""
    return {
        "type": "function",
        "function": {"name": function["name"], "description": described, "parameters": function["parameters"]},
    }

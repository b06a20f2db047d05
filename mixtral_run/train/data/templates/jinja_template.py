"""Jinja chat templates of models: tokens as `apply_chat_template` makes them, and the spans that are learned.

The learned spans are the template's `{% generation %}` blocks. Without such blocks, an answer is what the template adds
to the conversation before it: rendering of the messages up to the answer, with the prompt for generation, must be the
beginning of the rendering with the answer, which must be the beginning of the whole. Otherwise what generation sees is
not what training shows, and the example is refused.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from mixtral_run.train.data.reading.example import ASSISTANT, SYSTEM, Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.reading.json_values import read_json
from mixtral_run.train.data.templates.chat_template import ChatTemplate
from mixtral_run.train.data.templates.template_sandbox import Rendered, SandboxedTemplate, TemplateFailed
from mixtral_run.train.data.templates.text_encoder import TextEncoder, mapped, texts_of
from mixtral_run.weights.manifest.template_record import TemplateRecord

Span = tuple[int, int]
_MARKER = re.compile(r"<\|\w+\|>|\[/?[A-Z_]+\]|<</?SYS>>")
"""Marks of turns that templates write: ChatML's, Mistral's and Llama 2's."""


class JinjaTemplate(ChatTemplate):
    """A model's own chat template, or one from a file.

    Args:
        record: name and texts of the template.
        encoder: a TextEncoder for its texts.
        special_tokens: texts of the tokenizer's special tokens, such as `bos_token`.
        bos_id: id of the begin of a text.
        eos_id: id of the end of a text.
        where: the template's file, for errors.

    Raises:
        ConfigError: a text is no template of conversations.
    """

    def __init__(
        self,
        record: TemplateRecord,
        encoder: TextEncoder,
        special_tokens: Mapping[str, Any],
        bos_id: int,
        eos_id: int,
        where: str,
    ) -> None:
        super().__init__(record, encoder, bos_id, eos_id)
        self._template = SandboxedTemplate(record.text or "", where, special_tokens)
        self._template_with_tools = (
            SandboxedTemplate(record.tools_text, where, special_tokens) if record.tools_text else self._template
        )

    def describe(self) -> str:
        how = "its generation blocks" if self._template.has_generation else "what it adds for each answer"
        return f"{self.record.describe()}; learned is {how}"

    @property
    def text_markers(self) -> tuple[str, ...]:
        written = set(_MARKER.findall((self.record.text or "") + (self.record.tools_text or "")))
        return tuple(sorted(written - set(self.control)))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        conversation = self._conversation(messages, tools)
        with conversation.bounded():
            text = conversation.render(len(conversation.messages), prompt=True).text
        return conversation.encode(text)[0]

    def _encode_messages(self, example: Example) -> tuple[list[int], list[Span]]:
        conversation = self._conversation(example.messages, example.tools)
        with conversation.bounded():
            whole = conversation.render(len(conversation.messages))
            spans = conversation.learned_spans(whole)
        ids, places = conversation.encode(whole.text)
        learned = []
        for number, ((begin, end), is_learned) in enumerate(spans, start=1):
            first, last = _tokens_of(begin, end, places)
            stop = self._end_of_turn(ids, places, (first, last), whole.text)
            if not conversation.has_generation:
                last = stop or 0
            elif stop is None and last < len(ids) and self._is_added(ids, places, last, whole.text):
                # A block is learned as it is, with the end of the turn if the template writes it behind the block.
                last += 1
            elif stop is None and number == len(spans):
                # Only the last one: an answer may have several blocks.
                last = 0
            if not last:
                raise ExampleProblem(
                    f"the template ends an answer with {whole.text[:end][-20:]!r}, which has no control token; a model "
                    "would not learn to stop"
                )
            if is_learned:
                learned.append((first, last))
        return ids, learned

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> _Conversation:
        template = self._template_with_tools if tools else self._template
        return _Conversation(template, self._encoder, messages, tools)

    def _end_of_turn(self, ids: list[int], places: list[Span], span: Span, text: str) -> int | None:
        """Return the end of an answer's tokens: after the control token that ends the turn. None if there is none."""
        first, last = span
        end = next((end for end in range(last, first, -1) if self._is_added(ids, places, end - 1, text)), None)
        if end is None or text[places[end - 1][1] : places[last - 1][1]].strip():
            return None
        return end

    def _is_added(self, ids: list[int], places: list[Span], place: int, text: str) -> bool:
        begin, end = places[place]
        return self._encoder.is_added(ids[place], text[begin:end])


class _Conversation:
    """A conversation that a template renders, whole and in parts.

    hidden: the texts of the data contain control tokens, which stand-ins hide from the template.
    """

    def __init__(
        self,
        template: SandboxedTemplate,
        encoder: TextEncoder,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self._template, self._encoder = template, encoder
        # Exports of chats contain system messages without a text. They count as none.
        self.messages = [each for each in messages if each.role != SYSTEM or each.content]
        self._values: list[dict[str, Any]] = [_values(message) for message in self.messages]
        self._tools: list[dict[str, Any]] | None = [dict(tool) for tool in tools] or None
        self._plain = self._values, self._tools
        self.hidden = any(map(encoder.has_control, texts_of([self._values, self._tools])))
        if self.hidden:
            self._values, self._tools = mapped(self._plain, encoder.hide)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Bound the renderings within. Raises ExampleProblem if the template fails or exceeds the bounds."""
        try:
            with self._template.bounded():
                yield
        except TemplateFailed as failure:
            raise ExampleProblem(f"the chat template cannot write it: {failure}") from failure

    def render(self, count: int, *, prompt: bool = False) -> Rendered:
        """Render the first `count` messages, and the beginning of an answer if `prompt`."""
        rendered = self._template.render(self._values[:count], self._tools, add_generation_prompt=prompt)
        if self.hidden:
            values, tools = self._plain
            plain = self._template.render(values[:count], tools, add_generation_prompt=prompt)
            if self._encoder.show(rendered.text) != plain.text:
                raise ExampleProblem("a text contains a control token, and the template does not write it as it is")
        return rendered

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the ids of a rendering, and the place of each in it. Raises ExampleProblem."""
        return self._encoder.encode(text, hidden=self.hidden)

    @property
    def has_generation(self) -> bool:
        return self._template.has_generation

    def learned_spans(self, whole: Rendered) -> list[tuple[Span, bool]]:
        """Return the characters of the spans that may be learned, and for each whether its message is learned."""
        return self._generation_spans(whole) if self.has_generation else self._answer_spans(whole.text)

    def _generation_spans(self, whole: Rendered) -> list[tuple[Span, bool]]:
        """Return the generation blocks, and for each whether its message is learned."""
        flags = [message.learned for message in self.messages if message.role == ASSISTANT]
        if not whole.generated:
            raise ExampleProblem("the template's generation blocks are empty")
        if any(end > begin for (_, end), (begin, _) in pairwise(whole.generated)):
            raise ExampleProblem("the template has generation blocks inside of others")
        if all(flags):
            return [(span, True) for span in whole.generated]
        if len(whole.generated) != len(flags):
            raise ExampleProblem(
                f"the template writes {len(whole.generated)} generation blocks for {len(flags)} answers, of which some "
                "are not learned"
            )
        return list(zip(whole.generated, flags, strict=True))

    def _answer_spans(self, whole: str) -> list[tuple[Span, bool]]:
        """Return the characters of each answer, and whether it is learned."""
        spans = []
        for place, message in enumerate(self.messages):
            if message.role != ASSISTANT:
                continue
            before = self.render(place, prompt=True).text
            after = whole if place + 1 == len(self.messages) else self.render(place + 1).text
            self._check_beginning(after, f"the conversation up to message {place + 1}", whole, "the whole")
            self._check_beginning(before, f"the prompt for message {place + 1}", after, "the conversation with it")
            if len(before) == len(after):
                raise ExampleProblem(f"the template writes nothing for message {place + 1}")
            spans.append(((len(before), len(after)), message.learned))
        return spans

    def _check_beginning(self, text: str, name: str, longer: str, name_of_longer: str) -> None:
        """Raise ExampleProblem, with the first difference, unless `longer` begins with `text`."""
        if longer.startswith(text):
            return
        place = next(
            (place for place, (one, other) in enumerate(zip(text, longer, strict=False)) if one != other),
            min(len(text), len(longer)),
        )
        # A few characters before, so that a difference within a word can be read.
        begin = max(0, place - 12)
        found, expected = (self._encoder.show(each[begin : place + 24]) for each in (text, longer))
        raise ExampleProblem(
            f"the template does not write one conversation step by step: {name} has {found!r} where {name_of_longer} "
            f"has {expected!r} (character {place + 1})"
        )


def _values(message: Message) -> dict[str, Any]:
    """Return a message as templates read it. Arguments of tool calls are objects there, not JSON texts."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        values["tool_calls"] = [_call(call) for call in message.tool_calls]
    for name in ("tool_call_id", "name"):
        if getattr(message, name) is not None:
            values[name] = getattr(message, name)
    return values


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = read_json(function["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else dict(call)


def _tokens_of(begin: int, end: int, places: list[Span]) -> Span:
    """Return the first token that holds a character of [begin, end), and the last one plus 1."""
    first = bisect_right(places, begin, key=lambda place: place[1])
    # A blank that SentencePiece adds may be a token without a character of its own.
    while first and places[first - 1][0] >= begin:
        first -= 1
    return first, bisect_left(places, end, key=lambda place: place[0])

"""`data check`: what a training run would make of data. One pass; memory grows by about 100 bytes an example."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_run.config.data import CheckConfig
from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.train.data.check.length_advice import Advice, LengthRow, advise, histogram
from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.reading.examples import (
    NUM_PROBLEMS_SHOWN,
    ExampleStream,
    ReadOptions,
    counted,
    read_examples,
)
from mixtral_run.train.data.templates.encoded import EncodedExample

NUM_RENDERED = 3
Encode = Callable[[Example], EncodedExample]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a rendered example. learned: its tokens count in the loss."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as it is trained on."""

    place: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the examples.

    Attributes:
        num_tokens: of all examples.
        num_learned: tokens that count in the loss, whatever the length of a sample.
        num_truncated: examples longer than a sample.
        num_unlearned: examples of which nothing that is learned is within a sample.
        shortest, median, longest: of an example, in tokens.
        rows: the histogram.
        advice: the lengths that can be chosen.
    """

    num_tokens: int
    num_learned: int
    num_truncated: int
    num_unlearned: int
    shortest: int
    median: int
    longest: int
    rows: tuple[LengthRow, ...]
    advice: Advice


@dataclass(slots=True)
class CheckResult:
    """What was found. lengths: None without a tokenizer."""

    sources: tuple[str, ...]
    seq_length: int
    method: str | None = None
    num_examples: int = 0
    counts_by_shape: dict[str, int] = field(default_factory=dict)
    unused_keys: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    num_trimmed: int = 0
    num_duplicates: int = 0
    duplicates: list[str] = field(default_factory=list)
    num_bad: int = 0
    problems: list[str] = field(default_factory=list)
    lengths: Lengths | None = None
    rendered: list[Rendered] = field(default_factory=list)

    def to_mapping(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        from dataclasses import asdict

        return {"ok": not self.num_bad, **asdict(self)}


def check_data(
    config: CheckConfig,
    encode: Encode | None,
    decode: Callable[[list[int]], str] | None,
    advance: Callable[[int], None] = lambda _: None,
) -> CheckResult:
    """Read all data and return what was found. Problems of examples are in the result.

    Args:
        config: the sources; standard input is already copied to a file.
        encode: gives the tokens of an example; None counts none.
        decode: gives the text of tokens; None with `encode`.
        advance: called with 1 after each example.

    Raises:
        ConfigError: a file cannot be read, or there is no example at all.
    """
    stream = read_examples(config.data_path, ReadOptions.of(config), "data_path")
    result = CheckResult(tuple(source.name for source in stream.sources), config.seq_length, config.method)
    lengths = _LengthCount(config.seq_length)
    seen: set[bytes] = set()
    shown = _Shown()
    num_refused = 0
    for example in stream.examples():
        advance(1)
        digest = content_digest(example)
        is_new = digest not in seen
        if not is_new:
            result.num_duplicates += 1
            result.duplicates += [example.place] if len(result.duplicates) < NUM_PROBLEMS_SHOWN else []
        seen.add(digest)
        answers = example.named_answers()
        encoded = _encoded(encode, answers, stream)
        num_refused += encode is not None and encoded is None
        for each in encoded or ():
            lengths.add(each)
        if is_new and (encode is None or encoded is not None):
            shown.offer(answers, encoded)
    _take_over(stream, result)
    result.num_examples -= num_refused
    result.rendered = [
        _rendered(example, encoded[number] if encoded is not None else None, decode)
        for answers, encoded in shown.chosen()
        for number, example in enumerate(answers)
    ]
    if not result.num_examples and not result.num_bad:
        stream.raise_problems()
    result.lengths = lengths.result() if encode is not None and len(lengths.lengths) else None
    return result


def content_digest(example: Example) -> bytes:
    """Return a hash of what an example holds, apart from its place."""
    messages = [
        (each.role, each.content, each.learned, each.tool_calls, each.tool_call_id, each.name)
        for each in (*example.messages, *(example.rejected or ()))
    ]
    content = json.dumps([messages, example.text, example.tools, example.label], default=str, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).digest()


def _encoded(encode: Encode | None, answers: Sequence[Example], stream: ExampleStream) -> list[EncodedExample] | None:
    """Return the tokens of an example's answers, or None and note a problem if the chat template does not take it."""
    if encode is None:
        return None
    try:
        return [encode(each) for each in answers]
    except MixtralRunError as error:
        stream.problems.add(answers[0].place, [getattr(error, "problem", None) or error.what])
        return None


def _take_over(stream: ExampleStream, result: CheckResult) -> None:
    result.num_examples = sum(stream.counts_by_source)
    result.counts_by_shape = dict(stream.counts_by_shape.most_common())
    result.unused_keys = dict(stream.unused_keys.most_common())
    result.num_trimmed = stream.num_trimmed
    result.remarks = stream.remarks()
    result.num_bad, result.problems = stream.problems.num_examples, stream.problems.lines()


class _Shown:
    """The first examples of each kind, of which a few are rendered: of different kinds if there are several."""

    def __init__(self) -> None:
        self._kinds: dict[object, list[tuple[Sequence[Example], list[EncodedExample] | None]]] = {}

    def offer(self, answers: Sequence[Example], encoded: list[EncodedExample] | None) -> None:
        roles = tuple(message.role for message in answers[0].messages[:4])
        kept = self._kinds.setdefault(roles, [])
        if len(kept) < NUM_RENDERED:
            kept.append((answers, encoded))

    def chosen(self) -> list[tuple[Sequence[Example], list[EncodedExample] | None]]:
        """Return the examples to render: the first of each kind, then the second of each, and so on."""
        rounds = itertools.zip_longest(*self._kinds.values())
        return [each for one in rounds for each in one if each is not None][:NUM_RENDERED]


class _LengthCount:
    """Lengths of the examples as they come: twelve bytes each."""

    def __init__(self, seq_length: int) -> None:
        self._seq_length = seq_length
        self.lengths, self._learned, self._starts = array("i"), array("i"), array("i")

    def add(self, encoded: EncodedExample) -> None:
        self.lengths.append(len(encoded.tokens))
        self._learned.append(sum(end - begin for begin, end in encoded.learned))
        self._starts.append(encoded.learned[0][0] if encoded.learned else len(encoded.tokens))

    def result(self) -> Lengths:
        lengths = np.frombuffer(self.lengths, np.int32)
        starts = np.frombuffer(self._starts, np.int32)
        # n tokens give n - 1 positions with a label.
        fits = self._seq_length + 1
        return Lengths(
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_learned=int(np.frombuffer(self._learned, np.int32).sum(dtype=np.int64)),
            num_truncated=int((lengths > fits).sum()),
            num_unlearned=int((starts >= fits).sum()),
            shortest=int(lengths.min()),
            median=int(np.median(lengths)),
            longest=int(lengths.max()),
            rows=histogram(lengths),
            advice=advise(lengths, starts, self._seq_length),
        )


def _rendered(example: Example, encoded: EncodedExample | None, decode: Callable[[list[int]], str] | None) -> Rendered:
    """Return an example as text, with the parts that are learned; without tokens by its messages."""
    if encoded is None or decode is None:
        if example.text is not None:
            return Rendered(example.place, (Part(example.text, True),))
        parts = []
        for message in example.messages:
            calls = f" {json.dumps(list(message.tool_calls), default=str)}" if message.tool_calls else ""
            learned = message.role == "assistant" and message.learned
            parts += [Part(f"{message.role}: ", False), Part(message.content + calls, learned), Part("\n", False)]
        return Rendered(example.place, tuple(parts[:-1]))
    return rendered_tokens(example.place, encoded.tokens.tolist(), encoded.learned, decode)


def rendered_tokens(
    place: str, tokens: list[int], learned: Sequence[tuple[int, int]], decode: Callable[[list[int]], str]
) -> Rendered:
    """Return the text of tokens, with the parts that are learned. learned: begin and end of each span."""
    borders = [0, *(border for span in learned for border in span), len(tokens)]
    # Text up to a border, less the text up to the one before: decoders drop the space before a first word.
    texts = [decode(tokens[:border]) for border in borders]
    cuts = list(zip(texts, texts[1:], borders, borders[1:], strict=False))
    parts = [
        Part(after[len(before) :] if after.startswith(before) else decode(tokens[begin:end]), number % 2 == 1)
        for number, (before, after, begin, end) in enumerate(cuts)
        if begin < end
    ]
    return Rendered(place, tuple(parts))


def load_encoder(folder: Path, chat_template: str) -> tuple[Encode, Callable[[list[int]], str]]:
    """Return the functions that encode an example and decode tokens.

    Args:
        folder: of the tokenizer.
        chat_template: of --chat-template.
    """
    from mixtral_run.train.data.templates.open_template import open_chat_template
    from mixtral_run.train.data.templates.prompt import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False))

    return open_chat_template(chat_template, tokenizer).encode, decode


def problem_error(result: CheckResult) -> ConfigError:
    """Return the error for data with bad examples. Their problems are in the result, which is printed before it."""
    return ConfigError(
        f"{counted(result.num_bad, 'example')} cannot be used.",
        where=" ".join(result.sources),
        next_command=f"correct them, or mixtral-run {'finetune' if result.method is None else 'align'} … "
        "--skip-bad-examples, which leaves them out",
    )

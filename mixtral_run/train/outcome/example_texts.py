"""Examples of a run's data as text, and prompts of its validation set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixtral_run.results.report_page import ExampleText
from mixtral_run.train.data.check.rendering import rendered_tokens
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.data.samples import AnySource, Samples

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Prompt:
    """The beginning of an example up to its first answer. tokens: of the prompt; expected: of the answer."""

    place: str
    tokens: tuple[int, ...]
    expected: tuple[int, ...]


def example_texts(source: AnySource, open_decode: Callable[[], Decode], count: int) -> list[ExampleText]:
    """Return `count` examples from all over the data, as far as a sample holds them; none of mock data.

    Of preferences, both answers of a pair are examples. open_decode: called if there are examples, since opening a
    tokenizer takes seconds.
    """
    samples = source.examples if isinstance(source, PreferenceSamples) else _examples_of(source)
    if samples is None or not len(samples):
        return []
    decode = open_decode()
    found = []
    for index in _spread(source, len(samples), count):
        example = samples.example(index)
        place = example.place
        if isinstance(source, PreferenceSamples):
            place += f", {source.kind_of(index)}"
        rendered = rendered_tokens(place, list(example.tokens), example.learned, decode)
        found.append(ExampleText(rendered.place, tuple((part.text, part.learned) for part in rendered.parts)))
    return found


def _spread(source: AnySource, num_examples: int, count: int) -> list[int]:
    """Return the numbers of `count` examples from all over the data, or of both answers of `count` pairs."""
    each = 2 if isinstance(source, PreferenceSamples) and source.paired else 1
    chosen: list[int] = np.unique(np.linspace(0, num_examples // each - 1, count).astype(int)).tolist()
    return [each * index + number for index in chosen for number in range(each)]


def prompts_of(source: AnySource | None, count: int, longest: int) -> list[Prompt]:
    """Return the first `count` prompts of at most `longest` tokens. A text without a prompt gives none.

    Of preferences the chosen answers are what is expected.
    """
    samples = _examples_of(source)
    found: list[Prompt] = []
    for index in range(len(samples) if samples is not None else 0):
        if len(found) == count:
            break
        assert samples is not None
        example = samples.example(index)
        begin, end = example.learned[0] if example.learned else (0, 0)
        if 0 < begin <= longest and begin < len(example.tokens):
            found.append(Prompt(example.place, example.tokens[:begin], example.tokens[begin:end]))
    return found


def _examples_of(source: AnySource | None) -> Samples | None:
    if isinstance(source, PreferenceSamples):
        return source.chosen_examples
    samples = source.examples if isinstance(source, PackedSamples) else source
    return samples if isinstance(samples, Samples) else None

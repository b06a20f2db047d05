"""Examples of a run's data as text, and prompts of its validation set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixtral_run.results.report_page import ExampleText
from mixtral_run.train.data.check.check import rendered_tokens
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.samples import Samples, SampleSource

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Prompt:
    """The beginning of an example up to its first answer. tokens: of the prompt; expected: of the answer."""

    place: str
    tokens: tuple[int, ...]
    expected: tuple[int, ...]


def example_texts(source: SampleSource, open_decode: Callable[[], Decode], count: int) -> list[ExampleText]:
    """Return `count` examples from all over the data, as far as a sample holds them; none of mock data.

    open_decode: called if there are examples, since opening a tokenizer takes seconds.
    """
    samples = _examples_of(source)
    if samples is None or not len(samples):
        return []
    decode = open_decode()
    found = []
    for index in np.unique(np.linspace(0, len(samples) - 1, count).astype(int)).tolist():
        example = samples.example(index)
        rendered = rendered_tokens(example.place, list(example.tokens), example.learned, decode)
        found.append(ExampleText(rendered.place, tuple((part.text, part.learned) for part in rendered.parts)))
    return found


def prompts_of(source: SampleSource | None, count: int, longest: int) -> list[Prompt]:
    """Return the first `count` prompts of at most `longest` tokens. A text without a prompt gives none."""
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


def _examples_of(source: SampleSource | None) -> Samples | None:
    samples = source.examples if isinstance(source, PackedSamples) else source
    return samples if isinstance(samples, Samples) else None

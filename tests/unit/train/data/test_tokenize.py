"""Tokenization in several processes: the same as in one, in order, and a killed process is named."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_run.errors import TrainingError
from mixtral_run.train.data.cache import tokenize
from mixtral_run.train.data.cache.token_arrays import EncodedChunk
from mixtral_run.train.data.cache.tokenize import TokenizingProgress, tokenized
from mixtral_run.train.data.reading.example import ASSISTANT, TOOL, USER, Example, Message
from mixtral_run.train.data.templates.encoding import Encoding
from tests.support.samples import instruct_form


class KillingEncoding(Encoding):
    """An encoding whose processes are killed, as the kernel does when memory runs out."""

    def load(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def example(number: int) -> Example:
    answer = Message(ASSISTANT, "one " * (number % 7 + 1))
    return Example(f"line {number + 1}", (Message(USER, f"Say {number}."), answer))


EXAMPLES = [(0, example(number)) for number in range(1100)]


def test_several_processes_yield_what_one_yields(
    tiny_tokenizer_folder: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "FEW", 100)
    monkeypatch.setattr(tokenize, "CHUNKS_AHEAD", 1)
    encoding = Encoding(tiny_tokenizer_folder, "mixtral")
    counted: list[int] = []
    read: list[object] = []
    stream = tokenized((read.append(each) or each for each in EXAMPLES), encoding, counted.append, processes=2)
    chunks = [next(stream)]
    # Little is read ahead: otherwise a million examples would be in memory.
    assert len(read) <= 4 * 256
    chunks += stream
    alone = list(tokenized(iter(EXAMPLES), encoding, lambda _: None, processes=1))
    expected = EncodedChunk.of(instruct_form(tiny_tokenizer).encode(each) for _, each in EXAMPLES)
    for found in (chunks, alone):
        for name in ("tokens", "lengths", "spans", "num_spans"):
            joined = np.concatenate([getattr(chunk.encoded, name) for chunk in found])
            assert np.array_equal(joined, getattr(expected, name)), name
        assert [place for chunk in found for place in chunk.places] == [f"line {n + 1}" for n in range(1100)]
    assert [chunk.digests.tolist() for chunk in chunks] == [chunk.digests.tolist() for chunk in alone]
    assert counted == [256, 256, 256, 256, 76]


def test_examples_that_the_template_refuses_are_left_out_by_place(tiny_tokenizer_folder: Path) -> None:
    tools = Example("line 2", (Message(USER, "a"), Message(TOOL, "b", tool_call_id="c"), Message(ASSISTANT, "d")))
    mixed = [(0, example(0)), (1, tools), (2, example(2))]
    (chunk,) = tokenized(iter(mixed), Encoding(tiny_tokenizer_folder, "mixtral"), lambda _: None)
    assert chunk.places == ["line 1", "line 3"] and chunk.sources == [0, 2] and len(chunk.digests) == 2
    ((source, place, problem),) = chunk.problems
    assert (source, place) == (1, "line 2") and problem.startswith("tools: ")


def test_a_killed_process_is_named(tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "FEW", 100)
    with pytest.raises(TrainingError, match="process that tokenizes the data was killed"):
        list(
            tokenized(
                iter(EXAMPLES), KillingEncoding(tiny_tokenizer_folder, "mixtral"), lambda _: None, processes=1 + 1
            )
        )


def test_ctrl_c_is_left_to_the_process_that_reports_it(
    tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    handler = signal.getsignal(signal.SIGINT)
    try:
        tokenize._start(Encoding(tiny_tokenizer_folder, "mixtral"))
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)
        monkeypatch.setattr(tokenize, "_encode", None)


def test_progress_is_reported_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 102.0, 106.0, 108.0, 112.0, 112.5, 113.0))
    monkeypatch.setattr(tokenize.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    notes: list[str] = []
    progress = TokenizingProgress(1_000_000, said.append, notes.append)
    for _ in range(5):
        progress.advance(10_000)
    progress.finish()
    assert said == [
        "  tokenizing: 20,000 of about 1,000,000 (2%) examples, 3,333 a second",
        "  tokenizing: 40,000 of about 1,000,000 (4%) examples, 3,333 a second",
        "  tokenized 50,000 of about 1,000,000 (5%) examples, 3,846 a second",
    ]
    assert len(notes) == 5


def test_the_last_line_of_progress_does_not_repeat_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 109.0, 109.1))
    monkeypatch.setattr(tokenize.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    progress = TokenizingProgress(None, said.append, lambda _: None)
    progress.advance(36)
    progress.finish()
    assert said == ["  tokenizing: 36 examples, 4 a second"]

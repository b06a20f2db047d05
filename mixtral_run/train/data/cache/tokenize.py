"""Tokenization of a stream of examples: in this process if they are few, else in several processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixtral_run.errors import ConfigError, TrainingError
from mixtral_run.terminal.live import ActivityRow
from mixtral_run.train.data.cache.token_arrays import DTYPES, EncodedChunk
from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.data.templates.encoding import Encode, Encoding, content_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOTHING = EncodedExample(np.empty(0, np.int32), ())
"""In place of an answer that an example with one answer does not have."""
CHUNK = 256
FEW = 4096
"""Up to so many examples are tokenized in this process: starting others takes longer."""
MOST_PROCESSES = 16
"""One process reads and writes for the others; more than so many would wait for it."""
CHUNKS_AHEAD = 4
"""Chunks per process that wait to be tokenized or written, so that memory does not grow with the data."""


@dataclass(frozen=True)
class TokenizedChunk:
    """Some examples of the stream, in its order, without those that the chat template cannot take.

    Attributes:
        encoded: their tokens.
        digests: uint64, `content_digest` of each.
        sources, places: the number of each one's source, and where it stands there.
        problems: source, place and reason of each example that is left out.
        num_examples: with those. Of preferences an example has two rows of tokens.
    """

    encoded: EncodedChunk
    digests: NDArray[np.uint64]
    sources: list[int]
    places: list[str]
    problems: list[tuple[int, str, str]]
    num_examples: int


Numbered = tuple[int, Example]
"""An example with the number of its source."""


def tokenized(
    examples: Iterable[Numbered], encoding: Encoding, advance: Callable[[int], None], processes: int | None = None
) -> Iterator[TokenizedChunk]:
    """Yield all examples as token ids, in their order.

    Args:
        examples: a stream with the number of each one's source; a few thousand are in memory at a time.
        encoding: loaded in every process that tokenizes.
        advance: called with the number of examples that were tokenized.
        processes: to start. Default: one for each CPU that this process may use, up to MOST_PROCESSES.

    Raises:
        TrainingError: a process that tokenizes was killed.
        MixtralRunError: the tokenizer or the chat template cannot be used.
    """
    stream = iter(examples)
    first = list(itertools.islice(stream, FEW))
    count = processes or min(MOST_PROCESSES, _usable_cpus())
    chunks = _chunks(itertools.chain(first, stream))
    found = _here(chunks, encoding) if len(first) < FEW or count == 1 else _in_processes(chunks, encoding, count)
    for chunk in found:
        advance(chunk.num_examples)
        yield chunk


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(examples: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    stream = iter(examples)
    while chunk := list(itertools.islice(stream, CHUNK)):
        yield chunk


def _here(chunks: Iterable[list[Numbered]], encoding: Encoding) -> Iterator[TokenizedChunk]:
    encode = encoding.load()
    for chunk in chunks:
        yield _tokenize(encode, chunk)


def _in_processes(chunks: Iterable[list[Numbered]], encoding: Encoding, count: int) -> Iterator[TokenizedChunk]:
    waiting: deque[Future[TokenizedChunk]] = deque()
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(count, context, initializer=_start, initargs=(encoding,))
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_tokenize_in_process, chunk))
            if len(waiting) > count * CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingError(
            "A process that tokenizes the data was killed.",
            found="no result; the kernel does this when memory runs out: see dmesg",
            next_command="the same command, with more free memory",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encode: Encode | None = None
"""The encoding of a process that tokenizes."""


def _start(encoding: Encoding) -> None:
    """Prepare a process that tokenizes. It ends with the process that started it, even if that is killed."""
    global _encode
    # The processes share the CPUs; the tokenizer's own threads would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches this process as well; the one that started it reports the interruption, and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode = encoding.load()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_in_process(chunk: list[Numbered]) -> TokenizedChunk:
    assert _encode is not None
    return _tokenize(_encode, chunk)


def _tokenize(encode: Encode, chunk: list[Numbered]) -> TokenizedChunk:
    found, problems = [], []
    for source, example in chunk:
        try:
            digest = content_digest(example)
            encoded = [encode(each) if each is not None else NOTHING for each in example.answers()]
            found += [(source, example.place, digest, each) for each in encoded]
        except ConfigError as error:
            problems.append((source, example.place, getattr(error, "problem", error.what)))
    return TokenizedChunk(
        EncodedChunk.of(encoded for _, _, _, encoded in found),
        np.asarray([digest for _, _, digest, _ in found], DTYPES["digests"]),
        [source for source, _, _, _ in found],
        [place for _, place, _, _ in found],
        problems,
        len(chunk),
    )


class TokenizingProgress:
    """Lines about the tokenization: how many examples are done, of about how many, and the speed.

    say: prints a line. note: passes it on to processes that wait. row: shows it on a terminal instead of lines.
    """

    def __init__(
        self,
        about: int | None,
        say: Callable[[str], None],
        note: Callable[[str], None],
        row: ActivityRow | None = None,
    ) -> None:
        self._about, self._say, self._note, self._row = about, say, note, row
        self._done = self._done_when_told = 0
        self._started = self._told = time.monotonic()

    def advance(self, count: int) -> None:
        """Count examples; print a line every five seconds unless a row shows them."""
        self._done += count
        now = time.monotonic()
        self._note(self._text(now))
        if self._row is not None:
            self._row.text = self._text(now)
            self._row.share = min(1.0, self._done / self._about) if self._about else -1.0
        elif now - self._told >= 5.0:
            self._told, self._done_when_told = now, self._done
            self._say(f"  tokenizing: {self._text(now)}")

    def finish(self) -> None:
        """Print the last line if there was one before it, which says less."""
        if self._told != self._started and self._done != self._done_when_told:
            self._say(f"  tokenized {self._text(time.monotonic())}")

    def _text(self, now: float) -> str:
        of = ""
        if self._about:
            of = f" of about {max(self._about, self._done):,} ({min(1.0, self._done / self._about):.0%})"
        return f"{self._done:,}{of} examples, {self._done / max(now - self._started, 1e-9):,.0f} a second"

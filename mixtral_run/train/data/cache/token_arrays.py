"""Encoded examples as flat arrays, in memory or memory-mapped: a million examples cost no Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import mmap

    from numpy.typing import NDArray

    from mixtral_run.train.data.templates.encoded import EncodedExample

DTYPES: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "offsets": np.dtype("<i8"),
    "spans": np.dtype("<i4"),
    "span_offsets": np.dtype("<i8"),
    "digests": np.dtype("<u8"),
    "places": np.dtype("u1"),
    "place_offsets": np.dtype("<i8"),
}
"""The arrays of TokenArrays by name. All are one-dimensional on the disk."""

ROWS_BETWEEN_RELEASES = 256
"""Examples after which the pages that were read are unmapped. Each may have mapped half a megabyte around it."""


@dataclass(eq=False)
class TokenArrays:
    """Examples as flat arrays. Example i has the tokens from `offsets[i]` to `offsets[i + 1]`.

    Attributes:
        tokens: int32, of all examples one after the other, not truncated.
        offsets: int64 [examples + 1].
        spans: int32 [spans, 2], begin and end of each learned span within its example, in ascending order.
        span_offsets: int64 [examples + 1], of an example's spans.
        digests: uint64 [examples], a hash of each example's content, which duplicates share.
        places: uint8, where each example stands in its file, as UTF-8.
        place_offsets: int64 [examples + 1], of an example's place.
        highest_id: the highest token id; 0 if there is none.
        mapped: the memory map of `tokens`, if they are in a file.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    spans: NDArray[np.int32]
    span_offsets: NDArray[np.int64]
    digests: NDArray[np.uint64]
    places: NDArray[np.uint8]
    place_offsets: NDArray[np.int64]
    highest_id: int
    mapped: mmap.mmap | None = None
    _rows_read: int = field(default=0, init=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, places: Sequence[str], encoded: Iterable[EncodedExample], digests: Sequence[int] = ()) -> TokenArrays:
        """Return the arrays of a few examples in memory. digests: of each; by default all differ."""
        chunk = EncodedChunk.of(encoded)
        text = [place.encode() for place in places]
        return cls(
            chunk.tokens,
            _offsets(chunk.lengths),
            chunk.spans.reshape(-1, 2),
            _offsets(chunk.num_spans),
            np.asarray(digests or range(len(places)), DTYPES["digests"]),
            np.frombuffer(b"".join(text), DTYPES["places"]),
            _offsets(np.asarray([len(each) for each in text], np.int64)),
            int(chunk.tokens.max(initial=0)),
        )

    def place(self, index: int) -> str:
        """Return where an example stands in its file, such as "line 12"."""
        begin, end = self.place_offsets[index : index + 2].tolist()
        return self.places[begin:end].tobytes().decode("utf-8", "replace")

    def tokens_of(self, index: int, length: int) -> NDArray[np.int32]:
        """Return the first `length` tokens of an example, a view.

        From time to time the pages of the file that were read are unmapped. They stay in the page cache, which every
        process of the machine shares, but no longer count as memory of this process.
        """
        self._rows_read += 1
        if self.mapped is not None and self._rows_read % ROWS_BETWEEN_RELEASES == 0:
            self.release()
        begin = int(self.offsets[index])
        return self.tokens[begin : begin + length]

    def release(self) -> None:
        """Unmap the pages of the tokens' file that were read; the next access maps them again."""
        if self.mapped is not None:
            import mmap

            self.mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class EncodedChunk:
    """Some encoded examples as flat arrays, as a process that tokenizes returns them.

    lengths, num_spans: int64 [examples]; tokens: int32; spans: int32 [2 × spans].
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    spans: NDArray[np.int32]
    num_spans: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Iterable[EncodedExample]) -> EncodedChunk:
        """Join the arrays of the examples."""
        each = list(examples)
        spans = [number for example in each for span in example.learned for number in span]
        return cls(
            np.concatenate([np.empty(0, np.int32), *(example.tokens for example in each)]).astype(
                DTYPES["tokens"], copy=False
            ),
            np.asarray([len(example.tokens) for example in each], np.int64),
            np.asarray(spans, DTYPES["spans"]),
            np.asarray([len(example.learned) for example in each], np.int64),
        )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, DTYPES["offsets"])
    np.cumsum(lengths, out=offsets[1:])
    return offsets

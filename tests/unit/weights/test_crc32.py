"""CRC-32 of parts put together, beside zlib over the whole."""

from __future__ import annotations

import random
import zlib

from mixtral_run.weights.crc32 import joined


def test_joined_equals_the_whole() -> None:
    chance = random.Random()
    for _ in range(100):
        sizes = [chance.choice([0, 1, 7, 4096, chance.randrange(50_000)]) for _ in range(chance.randrange(1, 6))]
        parts = [chance.randbytes(size) for size in sizes]
        assert joined((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(b"".join(parts)), sizes


def test_order_and_length_count() -> None:
    first, second = (zlib.crc32(b"one"), 3), (zlib.crc32(b"two!"), 4)
    assert joined([first, second]) != joined([second, first])
    assert joined([first, second]) != joined([first, (second[0], 5)])
    assert joined([]) == zlib.crc32(b"")

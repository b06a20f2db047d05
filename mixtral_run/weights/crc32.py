"""CRC-32 of a whole from the CRC-32 of its parts: what lets several processes checksum one tensor.

The arithmetic is zlib's own (crc32.c 1.2.12, multmodp and x2nmodp): appending n bytes multiplies the checksum by x^8n
in GF(2)[x] modulo the CRC's polynomial, its bits reflected.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # x^0


def joined(parts: Iterable[tuple[int, int]]) -> int:
    """The checksum of parts one after another, each given as (CRC-32, bytes)."""
    whole = 0
    for crc, num_bytes in parts:
        whole = _times(_shift(num_bytes), whole) ^ crc
    return whole


@lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """x^(8 · num_bytes)"""
    result, square, exponent = _ONE, _ONE >> 1, 8 * num_bytes
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result


def _times(a: int, b: int) -> int:
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product

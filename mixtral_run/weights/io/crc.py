"""Compute the CRC-32 of whole files."""

from __future__ import annotations

from pathlib import Path

from isal.isal_zlib import crc32

_BLOCK_BYTES = 2**20


def crc_of(file: Path) -> int:
    """Return the CRC-32 of a whole file."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            crc = crc32(block, crc)
    return crc

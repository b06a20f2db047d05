"""Checksum of a JSON file within the file itself: its last field is the CRC-32 of the text with zeros in its place."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

FIELD = "crc32"
_ZEROS = "0" * 8
_LAST_FIELD = re.compile(rb'"crc32": "([0-9a-f]{8})"\n}\n\Z')


def with_checksum(content: Mapping[str, Any]) -> str:
    """Return the content as JSON text that ends with its own checksum."""
    text = json.dumps({**content, FIELD: _ZEROS}, indent=2) + "\n"
    head, _, tail = text.rpartition(_ZEROS)
    return f"{head}{zlib.crc32(text.encode()):08x}{tail}"


def checksum_problems(text: bytes) -> list[str]:
    """Return a line if a text is not what `with_checksum` returned."""
    found = _LAST_FIELD.search(text)
    if found is None:
        return [f"{FIELD}: expected the checksum of the file as its last field"]
    written = found[1].decode()
    counted = f"{zlib.crc32(text[: found.start(1)] + _ZEROS.encode() + text[found.end(1) :]):08x}"
    if counted == written:
        return []
    return [
        f"{FIELD}: expected {counted}, of the text as it is; found {written}: the file is not what was written "
        f"(if you changed it on purpose, remove the field {FIELD} and the field files)"
    ]

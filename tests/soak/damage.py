"""Damaged files from good ones: bytes that are flipped, cut, repeated or replaced, and JSON with odd values.

The damage follows from the random generator alone, so that a seed and a number name an input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "\x00", "\x1b[2J",
    "../x", "/etc/passwd", "ä" * 300, "\ud800", [], {}, [[]], [None], {"": None},
)  # fmt: skip
"""Values that a program may not expect in the place of another value."""
ODD_BYTES = (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\x1b[2J", b"\xed\xa0\x80", b"{", b"[" * 3000, b"9" * 500)
Damage = Callable[[Sequence[bytes], Random], bytes]


def damaged_bytes(seeds: Sequence[bytes], draw: Random) -> bytes:
    """Return one of the seeds with up to four edits, or now and then short random bytes."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.randrange(200))
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 4)):
        _edit(data, draw)
    return bytes(data)


def damaged_json(seeds: Sequence[bytes], draw: Random) -> bytes:
    """Return a JSON seed of which up to three values or keys are replaced or removed; now and then damaged bytes."""
    if draw.random() < 0.3:
        return damaged_bytes(seeds, draw)
    seed = draw.choice(seeds)
    try:
        values = json.loads(seed)
    except ValueError:  # a line with more than JSON in it
        return damaged_bytes([seed], draw)
    for _ in range(draw.randint(1, 3)):
        places = _places(values)
        if not places:
            break
        owner, key = draw.choice(places)
        change, odd = draw.random(), draw.choice(ODD_VALUES)
        if change < 0.15:
            del owner[key]
        elif change < 0.3 and isinstance(owner, dict):
            owner[str(odd)] = owner.pop(key)
        else:
            owner[key] = json.loads(json.dumps(odd))
    return json.dumps(values).encode()


def damaged_lines(seeds: Sequence[bytes], draw: Random) -> bytes:
    """Return a file of one JSON object a line: some lines are damaged, others are moved or repeated."""
    lines = [line for seed in seeds for line in seed.splitlines() if line]
    count = draw.randint(0, 6)
    return b"\n".join(draw.choice(lines) if draw.random() < 0.5 else damaged_json(lines, draw) for _ in range(count))


def _edit(data: bytearray, draw: Random) -> None:
    begin, length = draw.randrange(max(1, len(data))), draw.randint(1, 64)
    kind = draw.choice(("flip", "flip", "cut", "drop", "repeat", "insert"))
    if kind == "flip" and data:
        data[begin] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[begin:]
    elif kind == "drop":
        del data[begin : begin + length]
    elif kind == "repeat":
        data[begin:begin] = data[begin : begin + length]
    elif kind == "insert":
        data[begin:begin] = draw.choice(ODD_BYTES)


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Return (owner, key) of every value within JSON values."""
    found: list[tuple[Any, Any]] = []
    waiting = [values]
    while waiting:
        owner = waiting.pop()
        items: list[tuple[Any, Any]] = []
        if isinstance(owner, dict):
            items = list(owner.items())
        elif isinstance(owner, list):
            items = list(enumerate(owner))
        found += [(owner, key) for key, _ in items]
        waiting += [value for _, value in items]
    return found

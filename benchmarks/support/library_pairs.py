"""Instruction and response from text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OTHERS = {"site-packages", "dist-packages", "test", "tests"}
SAMPLE_CHARACTERS = 200_000
SURPLUS = 1.3
"""Pieces are this much longer than a row holds on average, so that nearly every row is full; the end is cut."""


def write_library_pairs(path: Path, tokenizer_file: Path, seq_length: int, count: int) -> int:
    """Write at most `count` pairs, each long enough to fill a row of `seq_length` tokens; returns how many."""
    from tokenizers import Tokenizer

    sample = ""
    for _, text in _sources():
        sample += text[: SAMPLE_CHARACTERS // 10]
        if len(sample) >= SAMPLE_CHARACTERS:
            break
    tokens = len(Tokenizer.from_file(str(tokenizer_file)).encode(sample).ids)
    size = round(SURPLUS * seq_length * len(sample) / tokens)
    written = 0
    with path.open("w", encoding="utf-8") as lines:
        for instruction, response in _pieces(size):
            if written == count:
                break
            lines.write(json.dumps({"instruction": instruction, "response": response}) + "\n")
            written += 1
    return written


def _pieces(size: int) -> Iterator[tuple[str, str]]:
    for name, text in _sources():
        for start in range(0, len(text) - size + 1, size):
            piece = text[start : start + size].strip()
            if piece:
                yield f"Go on with {name} from its character {start:,}.", piece


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if OTHERS.isdisjoint(name.parts):
            yield str(name), path.read_text(encoding="utf-8", errors="replace")

"""The result of `data check` as text for a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TextIO

from mixtral_run.train.data.check.check import CheckResult, Lengths, Part, Rendered
from mixtral_run.train.data.reading.examples import counted

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_BEGIN, _END = "⟦", "⟧"
_BAR_WIDTH = 40
_MOST_CHARACTERS = 1500
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, turn the direction of a text, or cannot be printed."""


def colored(stream: TextIO) -> bool:
    """Return True if the part that counts in the loss is shown in color: on a terminal, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def check_lines(result: CheckResult, *, color: bool) -> list[str]:
    """Return the lines of a result. color: show what counts in the loss in color, and in brackets otherwise."""
    return list(_lines(result, color))


def printable(text: str) -> str:
    """Return a text without characters that change a terminal: data are not trusted."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _lines(result: CheckResult, color: bool) -> Iterator[str]:
    yield f"{' '.join(map(printable, result.sources))}: {counted(result.num_examples, 'example')}"
    yield "  shapes: " + (", ".join(f"{name} {count:,}" for name, count in result.counts_by_shape.items()) or "none")
    places = f" ({printable('; '.join(result.duplicates))}{'; …' * (result.num_duplicates > len(result.duplicates))})"
    yield f"  exact duplicates: {result.num_duplicates:,}{places if result.num_duplicates else ''}"
    yield f"  examples that cannot be used: {result.num_bad:,}"
    yield from (f"    - {printable(problem)}" for problem in result.problems)
    for remark in result.remarks:
        yield f"  ! {printable(remark)}"
    if result.lengths is not None:
        yield from _length_lines(result.lengths, result)
    for rendered in result.rendered:
        yield ""
        yield from _rendered_lines(rendered, color)
    if result.rendered:
        yield ""
        marked = "green" if color else f"in {_BEGIN} {_END}"
        yield f"What is {marked} counts in the loss; the rest is context."


def _length_lines(lengths: Lengths, result: CheckResult) -> Iterator[str]:
    yield (
        f"  tokens: {lengths.num_tokens:,}, of which {lengths.num_learned:,} "
        f"({lengths.num_learned / max(lengths.num_tokens, 1):.0%}) count in the loss"
    )
    what = "an example" if result.method is None else "an answer with its prompt"
    yield f"  length of {what}: {lengths.shortest:,} to {lengths.longest:,} tokens, median {lengths.median:,}"
    most = max(row.num_examples for row in lengths.rows)
    for row in lengths.rows:
        bar = "█" * max(round(_BAR_WIDTH * row.num_examples / most), int(row.num_examples > 0))
        yield f"    {row.above + 1:>7,} – {row.up_to:>7,}  {row.num_examples:>9,}  {bar}".rstrip()
    if result.method is not None:
        refused = f"{counted(lengths.num_truncated, 'answer')} {'is' if lengths.num_truncated == 1 else 'are'} longer"
        yield f"  {refused} than --seq-length {result.seq_length:,}, which align refuses"
        # n tokens are n - 1 positions with a label.
        needed = -(-max(lengths.longest - 1, 64) // 64) * 64
        yield f"  next: mixtral-run align --method {result.method} --seq-length {needed} …"
        return
    yield (
        f"  --seq-length {result.seq_length:,} truncates {counted(lengths.num_truncated, 'example')}; "
        f"{lengths.num_unlearned:,} {'has' if lengths.num_unlearned == 1 else 'have'} nothing left to train on"
    )
    yield "  --seq-length   truncated   nothing left   padding   rows with --pack, at least"
    for choice in lengths.advice.choices:
        advised = "   ← choose this" if choice.seq_length == lengths.advice.seq_length else ""
        yield (
            f"  {choice.seq_length:>12,}   {choice.num_truncated:>9,}   {choice.num_unlearned:>12,}   "
            f"{choice.padding:>7.0%}   {choice.num_packed_rows:>9,}{advised}"
        )
    pack = " --pack" if lengths.advice.pack else ""
    yield f"  next: mixtral-run finetune --seq-length {lengths.advice.seq_length}{pack} …"


def _rendered_lines(rendered: Rendered, color: bool) -> Iterator[str]:
    yield f"{printable(rendered.place)}:"
    yield from "".join(_marked(part, color) for part in _shortened(rendered.parts)).split("\n")


def _marked(part: Part, color: bool) -> str:
    text = printable(part.text)
    if not part.learned:
        return text
    return f"{_GREEN}{text}{_PLAIN}" if color else f"{_BEGIN}{text}{_END}"


def _shortened(parts: tuple[Part, ...]) -> Iterator[Part]:
    """Yield the parts with the middle of long ones left out."""
    longest = max(_MOST_CHARACTERS // max(len(parts), 1), 40)
    for part in parts:
        text = part.text
        if len(text) > longest:
            half = longest // 2
            text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
        yield Part(text, part.learned)

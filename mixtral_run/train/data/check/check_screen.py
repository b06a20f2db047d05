"""The result of `data check` as text for a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TextIO

from mixtral_run.errors import escaped
from mixtral_run.train.data.check.check import CheckResult, Spelled
from mixtral_run.train.data.check.length_count import Lengths
from mixtral_run.train.data.check.rendering import Part, Rendered
from mixtral_run.train.data.reading.examples import NUM_PROBLEMS_SHOWN, counted
from mixtral_run.train.data.templates.spelled_tokens import AS_MARKER, AS_TEXT, AS_TOKEN

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_INVERSE = "\x1b[7m"
_BEGIN, _END = "⟦", "⟧"
_TOKEN_BEGIN, _TOKEN_END = "‹", "›"
_BAR_WIDTH = 40
_MOST_CHARACTERS = 1500


def colored(stream: TextIO) -> bool:
    """Return True if the part that counts in the loss is shown in color: on a terminal, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def check_lines(result: CheckResult, *, color: bool) -> list[str]:
    """Return the lines of a result. color: show what counts in the loss in color, and in brackets otherwise."""
    return list(_lines(result, color))


def _lines(result: CheckResult, color: bool) -> Iterator[str]:
    yield f"{' '.join(map(escaped, result.sources))}: {counted(result.num_examples, 'example')}"
    yield "  shapes: " + (", ".join(f"{name} {count:,}" for name, count in result.counts_by_shape.items()) or "none")
    places = f" ({escaped('; '.join(result.duplicates))}{'; …' * (result.num_duplicates > len(result.duplicates))})"
    yield f"  exact duplicates: {result.num_duplicates:,}{places if result.num_duplicates else ''}"
    yield f"  examples that cannot be used: {result.num_bad:,}"
    shown = result.problems[:NUM_PROBLEMS_SHOWN]
    yield from (f"    - {escaped(problem)}" for problem in shown)
    if (more := result.num_problems - len(shown)) > 0:
        listed = f"the first {len(result.problems):,}" if len(result.problems) < result.num_problems else "all"
        yield f"    and {more:,} more; --json lists {listed}"
    for remark in result.remarks:
        yield f"  ! {escaped(remark)}"
    yield from map(_spelled_line, result.spelled)
    if result.lengths is not None:
        yield from _length_lines(result.lengths, result)
    for rendered in result.rendered:
        yield ""
        yield from _rendered_lines(rendered, color)
    if result.rendered:
        yield ""
        marked = "green" if color else f"in {_BEGIN} {_END}"
        controls = any(part.control for rendered in result.rendered for part in rendered.parts)
        how = "inverted" if color else f"in {_TOKEN_BEGIN} {_TOKEN_END}"
        tokens = f" What is {how} is a control token." if controls else ""
        yield f"What is {marked} counts in the loss; the rest is context.{tokens}"


def _spelled_line(found: Spelled) -> str:
    """Return the line about texts that spell a control token or a marker."""
    places = "; ".join(found.places) + "; …" * (found.num_examples > len(found.places))
    has = "has a text that spells" if found.num_examples == 1 else "have texts that spell"
    kind = "the template's marker" if found.encoded_as == AS_MARKER else "the control token"
    how = {
        AS_TEXT: "It is encoded as text there, letter by letter, never as the token.",
        AS_MARKER: "The template writes it as text too, so that the model cannot tell the two apart.",
        AS_TOKEN: "It becomes the token there: remove it from the text.",
    }[found.encoded_as]
    examples = counted(found.num_examples, "example")
    return f"  ! {examples} {has} {kind} {escaped(found.token)!r} ({escaped(places)}). {how}"


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
        needed = -(-max(lengths.longest_row, lengths.longest - 1, 64) // 64) * 64
        pack = " --pack" if result.pack else ""
        yield f"  next: mixtral-run align --method {result.method} --seq-length {needed}{pack} …"
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
    yield f"{escaped(rendered.place)}:"
    yield from _marked_parts(_shortened(rendered.parts), color).split("\n")


def _marked(part: Part, color: bool) -> str:
    text = escaped(part.text)
    if part.control and not color:
        return f"{_TOKEN_BEGIN}{text}{_TOKEN_END}"
    look = color * (_GREEN * part.learned + _INVERSE * part.control)
    return f"{look}{text}{_PLAIN}" if look else text


def _marked_parts(parts: Iterable[Part], color: bool) -> str:
    """Return the text of parts. Without color, brackets enclose what counts in the loss with its control tokens."""
    found: list[str] = []
    before: Part | None = None
    for part in parts:
        continues = before is not None and before.learned and (before.control or part.control)
        text = _marked(part, color)
        if part.learned and not color and continues:
            found[-1] = found[-1].removesuffix(_END) + text + _END
        else:
            found.append(f"{_BEGIN}{text}{_END}" if part.learned and not color else text)
        before = part
    return "".join(found)


def _shortened(parts: tuple[Part, ...]) -> Iterator[Part]:
    """Yield the parts with the middle of long ones left out."""
    longest = max(_MOST_CHARACTERS // max(sum(not part.control for part in parts), 1), 40)
    for part in parts:
        text = part.text
        if len(text) > longest:
            half = longest // 2
            text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
        yield replace(part, text=text)

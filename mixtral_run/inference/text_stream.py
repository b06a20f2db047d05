"""The text of an answer while its tokens arrive: characters of several tokens are never given in parts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What a tokenizer writes for bytes that are not, or not yet, a character."""


def text_of(output: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> str:
    """Return the text of generated tokens. The token that ends it need not be a special one of the tokenizer."""
    ends = bool(output) and output[-1] in stop_ids
    return str(tokenizer.decode(list(output[:-1] if ends else output), skip_special_tokens=True)).strip()


_CONTROL = {code: REPLACEMENT for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def printable(text: str) -> str:
    """Return text of a model without control characters, which could rewrite what a terminal shows."""
    return text.translate(_CONTROL)


class TextStream:
    """Text of a growing list of tokens. The parts together are `text_of` of all tokens.

    The tokens since the last but one part are decoded together: what a token becomes depends on those before it, such
    as the blank in front of a word, and the bytes of one character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._first = self._read = 0
        self._blank: str | None = None

    def more(self, output: Sequence[int], *, ended: bool = False) -> str:
        """Return the text since the last call. output: all tokens so far. ended: no token will follow."""
        count = len(output) - bool(output and output[-1] in self._stop_ids)
        before = self._decode(output[self._first : self._read])
        text = self._decode(output[self._first : count])
        if text.endswith(REPLACEMENT) and not ended:
            return ""
        self._first, self._read = self._read, count
        return self._stripped(text[len(before) :])

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""

    def _stripped(self, text: str) -> str:
        """Return the text without blanks at the begin of the answer; blanks at its end wait for what follows."""
        if self._blank is None:
            text = text.lstrip()
            if not text:
                return ""
            self._blank = ""
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        return shown

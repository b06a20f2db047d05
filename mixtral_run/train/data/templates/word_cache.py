"""Token ids of texts from the ids of their words, for tokenizers where that gives the same ids.

Mixtral's tokenizer.json has no pre-tokenizer: its BPE merges a whole text at once. But no piece of its vocabulary
reaches from the end of a word over the `▁` of the next one, so that no merge does. The ids of a text are therefore
those of its words, and most words occur again and again. Looking them up takes a fifth of the tokenizer's time.
"""

from __future__ import annotations

import json
import re
from typing import Any

SPACE = "▁"
NORMALIZERS = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
"""Mixtral's: `▁` before the text, and in place of every blank."""
MOST_WORDS = 500_000
LONGEST_WORD = 40
"""Limits of what is kept, so that memory does not grow with the data."""
_ACROSS = re.compile(f"[^{SPACE}]{SPACE}")
_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_CHANGES_WORDS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


class WordCache:
    """The ids of words.

    Args:
        definition: a tokenizer.json of which `gives_the_same_ids` is True. Its added tokens are not looked for.
    """

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer

        values = json.loads(definition) | {"added_tokens": [], "normalizer": None, "post_processor": None}
        self._words: dict[str, list[int]] = {}
        self._tokenizer: Any = Tokenizer.from_str(json.dumps(values))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text that contains no added token."""
        found: list[int] = []
        marked = SPACE + text.replace(" ", SPACE) if text else ""
        for word in _WORD.findall(marked):
            ids = self._words.get(word)
            found += self._encoded(word) if ids is None else ids
        return found

    def _encoded(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= LONGEST_WORD and len(self._words) < MOST_WORDS:
            self._words[word] = ids
        return ids


def gives_the_same_ids(definition: str) -> bool:
    """Return True for a BPE on whole texts in which no piece reaches into the next word.

    definition: a tokenizer.json.
    """
    values = json.loads(definition)
    model, normalizer = values["model"], values.get("normalizer") or {}
    if model.get("type") != "BPE" or values.get("pre_tokenizer") is not None:
        return False
    # Unknown characters next to each other may become one token; `▁` must not be one of them.
    if normalizer.get("normalizers") != NORMALIZERS or SPACE not in model["vocab"]:
        return False
    if any(model.get(name) for name in _CHANGES_WORDS):
        return False
    return not any(_ACROSS.search(piece) for piece in model["vocab"])

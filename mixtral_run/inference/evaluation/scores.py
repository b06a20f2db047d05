"""Comparison of answers with references: exact match, and ROUGE-L by the package rouge-score."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec

Rouge = Callable[[str, str], float]
"""Takes reference and answer, returns ROUGE-L's F measure."""
_WORD = re.compile(r"\w+")


NO_ROUGE = "ROUGE-L is left out: it needs a package that is not installed here; pip install 'rouge-score>=0.1.2'"


class _Words:
    """Words of every script. rouge-score's own tokenizer knows a to z and digits only, and finds nothing in others."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


def open_rouge() -> Rouge | None:
    """Return the function that computes ROUGE-L (Lin 2004), from 0 to 1; None if rouge-score is not installed.

    Of two texts without a word it is 1 if they are equal, else 0.
    """
    if find_spec("rouge_score") is None:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer, words = RougeScorer(["rougeL"], tokenizer=_Words()), _Words()

    def rouge(reference: str, answer: str) -> float:
        if not words.tokenize(reference) and not words.tokenize(answer):
            return float(reference.strip() == answer.strip())
        return float(scorer.score(reference, answer)["rougeL"].fmeasure)

    return rouge


def exact_match(reference: str, answer: str) -> bool:
    """Return True if the texts are equal apart from blanks at their ends."""
    return reference.strip() == answer.strip()

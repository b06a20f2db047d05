"""Comparison of answers with references: exact match, and ROUGE-L by the package rouge-score."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec

from mixtral_run.errors import ConfigError

Rouge = Callable[[str, str], float]
"""Takes reference and answer, returns ROUGE-L's F measure."""
_WORD = re.compile(r"\w+")


def check_rouge() -> None:
    """Raise ConfigError if rouge-score is not installed."""
    if find_spec("rouge_score") is None:
        raise ConfigError(
            "Answers cannot be compared: ROUGE-L needs a package that is not installed here.",
            expected="the extra `evaluate` of mixtral-run: rouge-score",
            found="no module named 'rouge_score'",
            next_command="pip install 'rouge-score>=0.1.2'; or --no-answers, which computes the loss alone",
        )


class _Words:
    """Words of every script. rouge-score's own tokenizer knows a to z and digits only, and finds nothing in others."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


def open_rouge() -> Rouge:
    """Return the function that computes ROUGE-L (Lin 2004), from 0 to 1. Two texts without a word are equal: 1."""
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

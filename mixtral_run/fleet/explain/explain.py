"""Recognition of known failures in output, with their cause and next command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.explain.known_failure import KnownFailure
from mixtral_run.fleet.explain.known_failures import KNOWN_FAILURES
from mixtral_run.fleet.state import read_json, state_folder, write_json


def recognize_all(text: str) -> tuple[KnownFailure, ...]:
    """Return the known failures whose pattern occurs in `text`, in the order of occurrence."""
    found = []
    for failure in KNOWN_FAILURES:
        match = re.search(failure.pattern, text, re.IGNORECASE | re.DOTALL)
        if match:
            found.append((match.start(), failure))
    return tuple(failure for _, failure in sorted(found, key=lambda pair: pair[0]))


def recognize(text: str) -> KnownFailure | None:
    """Return the known failure that occurs first in `text`, or None."""
    return next(iter(recognize_all(text)), None)


def find(words: str) -> tuple[KnownFailure, ...]:
    """Return the known failures for a name, a pasted error message or words about it, best match first."""
    for failure in KNOWN_FAILURES:
        if failure.name == words.strip().lower():
            return (failure,)
    pasted = recognize_all(words)
    asked = _tokens(words, 2) - _NOISE
    scored = []
    for failure in KNOWN_FAILURES:
        handle = _tokens(" ".join((failure.name, *failure.words)), 2)
        described = _tokens(f"{failure.title} {failure.cause}", 3)
        score = 3 * len(asked & handle) + len((asked & described) - _COMMON)
        if failure in pasted:
            score += 100
        if score >= 3:
            scored.append((-score, KNOWN_FAILURES.index(failure), failure))
    return tuple(failure for _, _, failure in sorted(scored)[:5])


def _tokens(text: str, shortest: int) -> set[str]:
    """Return the words of a text in lower case, without the s of a plural."""
    return {re.sub(r"(?<=[a-z]{2})s$", "", word) for word in re.findall(rf"[a-z0-9_]{{{shortest},}}", text.lower())}


_COMMON = {"the", "and", "not", "for", "that", "with", "host", "may", "its", "are", "was", "has", "one", "does", "into"}


_NOISE = {"error", "issue", "problem", "failure", "failed", "fail"}
"""Words of a question that say nothing about the failure."""


def render(failure: KnownFailure) -> str:
    """Return a known failure as text for the terminal."""
    lines = [f"{failure.title}  ({failure.name})", f"  cause: {failure.cause}"]
    lines += [f"  next:  {command}" for command in failure.commands]
    return "\n".join(lines)


def failures_file() -> Path:
    """Return the file with the recorded failures."""
    return state_folder() / "failures.json"


def record_failures(messages: dict[str, str]) -> None:
    """Record the last error of hosts and jobs for `explain HOST`, in the place of earlier ones."""
    write_json(failures_file(), messages)


def explain(words: str) -> str:
    """Return the answer to `mixtral-run explain WORDS`. Raises ConfigError if no known failure matches."""
    recorded, found = _answer(words)
    explained = [_explain_recorded(name, message) for name, message in recorded.items()]
    if not words:
        listed = [f"  {failure.name:<18} {failure.title}" for failure in found]
        return "\n\n".join([*explained, "Known failures (mixtral-run explain NAME):\n" + "\n".join(listed)])
    return "\n\n".join([*explained, *(render(failure) for failure in found)])


def explain_json(words: str) -> dict[str, Any]:
    """Return the answer to `mixtral-run explain WORDS --json`. Raises ConfigError if no known failure matches."""
    recorded, found = _answer(words)
    return {
        "recorded": [
            {"name": name, "message": message, "failures": [_as_json(each) for each in recognize_all(message)]}
            for name, message in recorded.items()
        ],
        "failures": [_as_json(failure) for failure in found],
    }


def _answer(words: str) -> tuple[dict[str, str], tuple[KnownFailure, ...]]:
    """Return the recorded messages and the known failures that answer `words`. Raises ConfigError if there are none."""
    recorded: dict[str, str] = read_json(failures_file(), {})
    if words in recorded:
        return {words: recorded[words]}, ()
    if not words:
        return recorded, tuple(KNOWN_FAILURES)
    found = find(words)
    if not found:
        raise ConfigError(
            f"No known failure matches {words[:80]!r}.",
            next_command="mixtral-run explain    # the whole list; or paste the error message",
        )
    return {}, found


def _as_json(failure: KnownFailure) -> dict[str, Any]:
    return {
        "name": failure.name, "title": failure.title, "cause": failure.cause, "commands": list(failure.commands)
    }  # fmt: skip


def _explain_recorded(name: str, message: str) -> str:
    known = recognize_all(message)
    if not known:
        return f"{name}: {message}\n  This failure is not among the known ones."
    return "\n".join([f"{name}: {message.splitlines()[0]}", *(render(failure) for failure in known)])

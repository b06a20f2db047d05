"""A small client of OpenAI's completions API, which says in words what is wrong with an answer."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from mixtral_run.errors import HostError

TIMEOUT_SECONDS = 300
_LARGEST_ANSWER = 64 << 20


class Refused(HostError):
    """The server answered with an HTTP error. status: its number."""

    def __init__(self, status: int, url: str, text: str) -> None:
        super().__init__(
            "The server answered with an error.", where=url, found=f"HTTP {status}: {' '.join(text.split())[:300]}"
        )
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A completion.

    tokens: its ids; logprobs: the log probability of each. None if the server does not report them. ended: the model
    ended the text itself, as far as the server reports it.
    """

    text: str
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    ended: bool = False


class OpenAIClient:
    """Requests to one server. url: with or without /v1 at its end. key: for the Authorization header."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = key

    def models(self) -> list[str] | None:
        """Return the names of the models; None if the server does not list them. Raises HostError if it is dead."""
        try:
            found = self._request("/v1/models", None)
        except Refused:
            return None
        entries = found.get("data")
        if not isinstance(entries, list):
            return None
        return [str(each["id"]) for each in entries if isinstance(each, dict) and "id" in each]

    def complete(self, model: str, prompt: Sequence[int] | str, max_tokens: int, **more: Any) -> Completion:
        """Return the greedy completion of a prompt: ids or a text. Raises HostError, and Refused for HTTP errors."""
        values = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **more}
        found = self._request("/v1/completions", values)
        choices = found.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise self._odd("choices[0].text", found)
        tokens = choice.get("token_ids")
        known = isinstance(tokens, list) and all(type(each) is int and each >= 0 for each in tokens)
        ids = tuple(tokens) if known else None  # type: ignore[arg-type]
        return Completion(choice["text"], ids, _logprobs(choice), choice.get("finish_reason") == "stop")

    def _request(self, path: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
        url = self._url + path
        data = json.dumps(values).encode() if values is not None else None
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            # Not `urlopen`, which keeps the proxies that the environment had at its first call in this process.
            opener = urllib.request.build_opener()
            with opener.open(urllib.request.Request(url, data, headers), timeout=TIMEOUT_SECONDS) as answer:
                text = answer.read(_LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, url, error.read(10_000).decode("utf-8", "replace")) from error
        except (OSError, HTTPException, ValueError) as error:
            raise HostError(
                "The server does not answer.",
                where=url,
                found=str(getattr(error, "reason", None) or error) or type(error).__name__,
                next_command="start it, or give --prove the URL that it listens on; mixtral-run jobs lists servers",
            ) from error
        try:
            found = json.loads(text)
        except ValueError as error:
            raise self._odd("a JSON object", text[:200].decode("utf-8", "replace")) from error
        if not isinstance(found, dict):
            raise self._odd("a JSON object", found)
        return found

    def _odd(self, expected: str, found: object) -> HostError:
        return HostError(
            "The server's answer is not that of OpenAI's API.",
            where=self._url,
            expected=expected,
            found=(found if isinstance(found, str) else json.dumps(found))[:300],
        )


def _logprobs(choice: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return the log probability of each token; None if the server reports none, or zeros, as some do when greedy."""
    found = choice.get("logprobs")
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(values, list) or not all(type(each) in (int, float) for each in values) or not any(values):
        return None
    return tuple(map(float, values))

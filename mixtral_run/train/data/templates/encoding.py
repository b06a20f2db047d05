"""The way from an example to token ids, in a form that the processes that tokenize can load for themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mixtral_run.config.data import CHAT_TEMPLATES
from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.data.templates.open_template import open_chat_template
from mixtral_run.train.data.templates.prompt import load_tokenizer
from mixtral_run.weights.hf.tokenizer_files import tokenizer_files

VERSION = 1
"""Version of the kit's own encoding. Increase it when the same example gets other tokens."""

Encode = Callable[[Example], EncodedExample]


@dataclass(frozen=True)
class Encoding:
    """Tokenizer and chat template. tokenizer_folder: of the tokenizer's files. chat_template: of --chat-template."""

    tokenizer_folder: Path
    chat_template: str

    def load(self) -> Encode:
        """Return the function that encodes an example. It raises ExampleProblem for one that the template refuses."""
        return open_chat_template(self.chat_template, load_tokenizer(self.tokenizer_folder)).encode

    def facts(self) -> dict[str, Any]:
        """Return what a run must know: the id for padding, the number of ids, and the template for manifests."""
        tokenizer = load_tokenizer(self.tokenizer_folder)
        return {
            # Any valid id pads: padding is masked out of the loss, and follows every token that attention covers.
            "padding_id": int(tokenizer.eos_token_id),
            "tokenizer_size": max(tokenizer.get_vocab().values()) + 1,
            "chat_template": open_chat_template(self.chat_template, tokenizer).record.to_mapping(),
        }

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the token ids. No tokenizer is loaded, so that it takes no time."""
        digest = hashlib.sha256(f"{VERSION}, tokenizers {version('tokenizers')}\n".encode())
        if self.chat_template in CHAT_TEMPLATES:
            digest.update(f"{self.chat_template}\n".encode())
        else:
            digest.update(f"file {hashlib.sha256(_content(Path(self.chat_template))).hexdigest()}\n".encode())
        for name in tokenizer_files(self.tokenizer_folder):
            digest.update(
                f"{name} {hashlib.sha256((self.tokenizer_folder / name).read_bytes()).hexdigest()}\n".encode()
            )
        return digest.hexdigest()


def _content(path: Path) -> bytes:
    """Return the content of a file; nothing if it cannot be read, which `open_chat_template` reports."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def content_digest(example: Example) -> int:
    """Return a hash of 64 bits of an example's texts. It depends on nothing else, so that duplicates share it."""
    parts: list[Any] = [_content_of(example.messages), example.text, list(example.tools)]
    if example.rejected is not None:
        parts.append(_content_of(example.rejected))
    elif example.label is not None:
        parts.append(example.label)
    text = json.dumps(parts, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _content_of(messages: Sequence[Message]) -> list[list[Any]]:
    return [
        [message.role, message.content.strip(), list(message.tool_calls), message.tool_call_id, message.name]
        for message in messages
        if message.content.strip() or message.tool_calls
    ]

"""A chat template as an adapter's manifest records it. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.weights.hf.tokenizer_files import CHAT_TEMPLATE, MORE_TEMPLATES


@dataclass(frozen=True)
class TemplateRecord:
    """Name and texts of a chat template. They do not depend on the tokenizer.

    Attributes:
        name: "mixtral", "tokenizer" for a tokenizer's own, or the name of a file.
        text: the Jinja template; None for Mixtral-Instruct's form.
        tools_text: the Jinja template for conversations with tools, if the tokenizer has another one for them.
    """

    name: str
    text: str | None = None
    tools_text: str | None = None

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the texts."""
        return hashlib.sha256(json.dumps([self.text, self.tools_text]).encode()).hexdigest()

    def to_mapping(self) -> dict[str, str | None]:
        """Return the record as JSON values."""
        found = {"name": self.name, "text": self.text, "tools_text": self.tools_text}
        return found | {"fingerprint": self.fingerprint}

    @classmethod
    def parse(cls, values: object) -> TemplateRecord | None:
        """Return the record from JSON values; None if they are none, or damaged."""
        if not isinstance(values, Mapping):
            return None
        name, text, tools_text = (values.get(key) for key in ("name", "text", "tools_text"))
        texts_are_texts = all(each is None or isinstance(each, str) for each in (text, tools_text))
        if not isinstance(name, str) or not texts_are_texts:
            return None
        record = cls(name, text, tools_text)
        return record if values.get("fingerprint") == record.fingerprint else None

    def write(self, folder: Path) -> None:
        """Write the template next to a tokenizer's files, where it takes precedence.

        Nothing is written for Mixtral-Instruct's form, which a tokenizer without a template is used with.
        """
        if self.text is None:
            return
        (folder / CHAT_TEMPLATE).write_text(self.text, encoding="utf-8")
        if self.tools_text is not None:
            (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
            (folder / MORE_TEMPLATES / "tool_use.jinja").write_text(self.tools_text, encoding="utf-8")

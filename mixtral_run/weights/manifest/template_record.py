"""A chat template as an adapter's manifest records it. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.weights.hf.tokenizer_files import CHAT_TEMPLATE, MORE_TEMPLATES

OF_TOKENIZER = "tokenizer"
"""Name of a tokenizer's own template."""
_DEFAULT, _TOOLS = "default", "tool_use"
"""Names that Transformers gives a tokenizer's templates."""
_TOOL_USE, _TOKENIZER_CONFIG = f"{_TOOLS}.jinja", "tokenizer_config.json"


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

    def describe(self) -> str:
        """Return the template's name in words."""
        if self.text is None:
            return "Mixtral-Instruct's form"
        return "the tokenizer's own" if self.name == "tokenizer" else self.name

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
            (folder / MORE_TEMPLATES / _TOOL_USE).write_text(self.tools_text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TemplateRecord | None:
        """Return the template next to a tokenizer's files, as Transformers finds it; None if there is none.

        Raises OSError if a file cannot be read, ValueError if it is not what Transformers writes.
        """
        if (folder / CHAT_TEMPLATE).is_file():
            tools = folder / MORE_TEMPLATES / _TOOL_USE
            tools_text = tools.read_text(encoding="utf-8") if tools.is_file() else None
            return cls(OF_TOKENIZER, (folder / CHAT_TEMPLATE).read_text(encoding="utf-8"), tools_text)
        if not (folder / _TOKENIZER_CONFIG).is_file():
            return None
        try:
            values = json.loads((folder / _TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        except RecursionError as error:
            raise ValueError(f"{_TOKENIZER_CONFIG} is nested too deeply") from error
        own = values.get("chat_template") if isinstance(values, Mapping) else None
        if isinstance(own, list):
            own = {str(each.get("name")): each.get("template") for each in own if isinstance(each, Mapping)}
        return cls.of_tokenizer(own)

    @classmethod
    def of_tokenizer(cls, own: object) -> TemplateRecord | None:
        """Return the record of a tokenizer's own template; None if it has none.

        Args:
            own: `chat_template` of a tokenizer of Transformers: None, a text, or texts by name.

        Raises:
            ValueError: several templates of which none is the default, or one that is no text.
        """
        if not own:
            return None
        texts = own if isinstance(own, Mapping) else {_DEFAULT: own}
        text = next(iter(texts.values())) if len(texts) == 1 else texts.get(_DEFAULT)
        tools_text = texts.get(_TOOLS) if len(texts) > 1 else None
        if text is None:
            raise ValueError(f"several chat templates, none named {_DEFAULT!r}: {', '.join(sorted(texts))}")
        if not isinstance(text, str) or not isinstance(tools_text, str | None):
            raise ValueError("a chat template that is no text")
        return cls(OF_TOKENIZER, text, tools_text)

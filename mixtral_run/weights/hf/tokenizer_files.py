"""The tokenizer's files next to the weights: their names, and copying them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
"""File of the default chat template, and folder of those for other purposes, such as tool_use."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "merges.txt",
    "vocab.json",
    "config.json",
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy those of the tokenizer's files and the two configs that exist; return their names."""
    target.mkdir(parents=True, exist_ok=True)
    found = _tokenizer_files(source)
    for name in found:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return found


def tokenizer_problems(source: Path) -> list[str]:
    """Return a line for each file that this user may not read; checked before the weights are copied."""
    return [
        f"{source / name}: cannot be read by this user"
        for name in _tokenizer_files(source)
        if not os.access(source / name, os.R_OK)
    ]


def _tokenizer_files(source: Path) -> list[str]:
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    return found + sorted(f"{MORE_TEMPLATES}/{path.name}" for path in (source / MORE_TEMPLATES).glob("*.jinja"))

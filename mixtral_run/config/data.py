"""Settings of the data of a training run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.fields import Config, setting
from mixtral_run.config.sections import DATA

AUTO_TEMPLATE, MIXTRAL_TEMPLATE = CHAT_TEMPLATES = ("auto", "mixtral")
"""Values of --chat-template that name no file."""


def chat_template_setting(section: str, more: str = "") -> Any:
    """Declare --chat-template. section: of --help. more: a further sentence of its help."""
    text = (
        "Chat template: auto (the tokenizer's own; Mixtral-Instruct's form if it has none), mixtral, or a file with a "
        "Jinja template."
    )
    return setting(AUTO_TEMPLATE, help=f"{text} {more}".rstrip(), section=section)


def chat_template_problems(choice: str) -> list[str]:
    """Return the problem of an empty --chat-template, which usually comes from an unset shell variable."""
    return [] if choice else [f"--chat-template: expected {', '.join(CHAT_TEMPLATES)} or a file; found an empty text"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Source of the samples, and their length."""

    data_path: Path | None = setting(
        None, help='JSONL file of {"instruction": …, "response": …} or {"messages": […]}.', section=DATA
    )
    mock_data: bool = setting(False, help="Train on random tokens instead of a file.", section=DATA)
    seq_length: int = setting(
        512, help="Tokens per sample. Shorter samples are padded, longer ones are cut.", minimum=2, section=DATA
    )
    chat_template: str = chat_template_setting(DATA)

    def problems(self) -> list[str]:
        found = super().problems() + chat_template_problems(self.chat_template)
        if self.mock_data and self.data_path is not None:
            found.append("--mock-data and --data-path: expected one of them; found both")
        if not self.mock_data and self.data_path is None:
            found.append("--data-path FILE or --mock-data: expected one of them; found neither")
        return found

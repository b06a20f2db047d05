"""Settings of the data of a training run, and of `data check`. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.data_sources import source_problems
from mixtral_run.config.fields import DATA, LAYOUT, OUTPUT, PREFERENCES, Config, flag_of, setting

DATA_SETTINGS = ("data_path", "valid_data_path")
"""Settings that name sources of examples."""
AUTO = "auto"
SHAPES = ("instruction", "alpaca", "dolly", "prompt", "question", "messages", "sharegpt", "text")
"""Shapes of an example: which keys hold what (train/data/reading/shapes.py)."""
FIELDS = (
    "instruction", "input", "context", "response", "output", "prompt", "completion", "question", "answer", "messages",
    "conversations", "text", "system", "tools",
)  # fmt: skip
"""Keys of the shapes, which --field maps other keys to."""
DPO, KTO, ORPO, SIMPO = METHODS = ("dpo", "kto", "orpo", "simpo")
"""Losses over preferences."""
PAIRS, UNPAIRED = ("pairs", "unpaired")
"""Shapes of preferences: two answers to a prompt, or one answer with a label."""
PREFERENCE_FIELDS = ("prompt", "chosen", "rejected", "completion", "label", "system", "tools")
"""Keys of preferences, which --field maps other keys to."""
SOURCE_FORMS = (
    "JSONL, JSON, CSV, TSV, Parquet or Arrow, also compressed; a folder of such files; '-' for standard input; or "
    "OWNER/NAME[@REVISION][:SPLIT] on the hub"
)

AUTO_TEMPLATE, MIXTRAL_TEMPLATE = CHAT_TEMPLATES = ("auto", "mixtral")
"""Values of --chat-template that name no file."""


def preferences_of(method: str | None) -> str | None:
    """Return what a method of align learns from: pairs, or unpaired for pairs and single answers; None without one."""
    return None if method is None else UNPAIRED if method == KTO else PAIRS


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
class ExampleConfig(Config):
    """How records of data become examples."""

    data_format: str = setting(
        AUTO,
        help="Shape of the examples. auto: recognize it in each example by its keys.",
        choices=(AUTO, *SHAPES),
        section=DATA,
    )
    field: tuple[str, ...] = setting(
        (),
        help="Other name of a key: --field response=solution takes 'solution' as the response. Repeat it for several.",
        section=DATA,
    )

    @property
    def preferences(self) -> str | None:
        """What of preferences the examples are: pairs, or unpaired for single ones too; None for other examples."""
        return preferences_of(getattr(self, "method", None))

    @classmethod
    def with_current_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by current names; the text of a single source becomes a list, as older configs have it."""
        found = super().with_current_names(values)
        for name in DATA_SETTINGS:
            if isinstance(found.get(name), (str, Path)):
                found[name] = [str(found[name])]
        return found

    def problems(self) -> list[str]:
        found = super().problems()
        known = FIELDS if self.preferences is None else PREFERENCE_FIELDS
        seen: set[str] = set()
        for pair in self.field:
            name, equals, key = pair.partition("=")
            if not equals or not key or name not in known:
                found.append(f"--field: expected NAME=KEY with a NAME of {', '.join(known)}; found {pair!r}")
            elif name in seen:
                found.append(f"--field {name}: expected once; found twice")
            seen.add(name)
        for name in DATA_SETTINGS:
            texts = getattr(self, name, ())
            found += source_problems(flag_of(name), texts, weights=name == "data_path")
        return found


@dataclass(frozen=True, kw_only=True)
class DataConfig(ExampleConfig):
    """Source of the samples, and their length."""

    data_path: tuple[str, ...] = setting(
        (),
        help=f"Training data: {SOURCE_FORMS}. Repeat it for several sources; PATH:WEIGHT sets the share of each among "
        "the samples.",
        section=DATA,
    )
    skip_bad_examples: bool = setting(
        False, help="Leave out examples that cannot be used, and report how many, instead of ending.", section=DATA
    )
    mock_data: bool = setting(False, help="Train on random tokens instead of a file.", section=DATA)
    seq_length: int = setting(
        512, help="Tokens per sample. Shorter samples are padded, longer ones are cut.", minimum=2, section=DATA
    )
    chat_template: str = chat_template_setting(DATA)

    def problems(self) -> list[str]:
        found = super().problems() + chat_template_problems(self.chat_template)
        if self.mock_data and self.data_path:
            found.append("--mock-data and --data-path: expected one of them; found both")
        if not self.mock_data and not self.data_path:
            found.append(
                "--data-path FILE or --mock-data: expected one of them; found neither"
                if self.preferences is None
                else "--data-path FILE: expected training data; found none"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ExampleConfig):
    """A check of data before a training run."""

    data_path: tuple[str, ...] = setting((), help=f"Data to check: {SOURCE_FORMS}.", section=DATA, positional="PATH")
    load: Path | None = setting(
        None,
        help="Base model whose tokenizer counts the tokens: a converted checkpoint, or an HF model (its directory, or "
        "its name on the hub). Default: count no tokens.",
        section=LAYOUT,
    )
    method: str | None = setting(
        None,
        help="Check preferences for this method of align. Default: check what finetune learns from.",
        choices=METHODS,
        section=PREFERENCES,
    )
    seq_length: int = setting(512, help="Tokens per sample of the planned run.", minimum=2, section=DATA)
    pack: bool = setting(
        False,
        help="The planned run packs: with --method, both answers of a pair must then fit into one row.",
        section=DATA,
    )
    valid_fraction: float = setting(
        0.0,
        help="The --valid-fraction of the planned run: report how many examples are for training and for validation.",
        minimum=0,
        section=DATA,
    )
    chat_template: str = chat_template_setting(DATA)
    json: bool = setting(False, help="Print the result as JSON.", section=OUTPUT)

    def problems(self) -> list[str]:
        found = super().problems() + chat_template_problems(self.chat_template)
        if self.valid_fraction >= 1:
            found.append(f"--valid-fraction: expected less than 1; found {self.valid_fraction:g}")
        return found + ([] if self.data_path else ["PATH is missing"])

"""Names of models on the hub. Standard library only."""

from __future__ import annotations

import re

HF_MODEL_SETTINGS = ("load", "against", "hf_model_path")
"""Settings that take an HF model: its directory, or its name on the hub."""


def may_be_hub_name(text: str) -> bool:
    """Return True if a text has the form of a model's name on the hub: ORG/NAME, or ORG/NAME@REVISION."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?", text) is not None


def hub_name_and_revision(text: str) -> tuple[str, str | None]:
    """Split `ORG/NAME@v1` into ("ORG/NAME", "v1"). Return a path unchanged, with None."""
    name, _, revision = text.partition("@") if may_be_hub_name(text) else (text, "", "")
    return name, revision or None

"""Settings of `up`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import LAYOUT, OUTPUT, setting
from mixtral_run.config.training import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class UpConfig(FinetuneConfig):
    """All steps from a bare host to an adapter on this machine.

    Relative paths are paths on the host, except those of data and `output_path`.
    """

    hf_model_path: str = setting(
        "mistralai/Mixtral-8x7B-v0.1",
        help="HF model to convert: its name on the hub, or its folder on the host.",
        section=LAYOUT,
    )
    load: Path = setting(
        Path("mixtral"), help="Converted checkpoint on the host; created if it is missing.", section=LAYOUT
    )
    save: Path = setting(Path("adapter"), help="Folder on the host for the checkpoints of the adapter.", section=OUTPUT)
    output_path: Path = setting(
        Path("adapter"), help="Folder on this machine for the exported adapter.", section=OUTPUT
    )

"""Settings of the data of a training run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import Config, setting
from mixtral_run.config.sections import DATA


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

    def problems(self) -> list[str]:
        found = super().problems()
        if self.mock_data and self.data_path is not None:
            found.append("--mock-data and --data-path: expected one of them; found both")
        if not self.mock_data and self.data_path is None:
            found.append("--data-path FILE or --mock-data: expected one of them; found neither")
        return found

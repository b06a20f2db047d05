"""What a run leaves for people: its record at the start; summary and plots at the end or after a stop."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.training import FinetuneConfig
from mixtral_run.report import Report
from mixtral_run.results import run_files
from mixtral_run.results.kit import this_kit
from mixtral_run.results.loss_plot import write_loss_plot
from mixtral_run.results.read_run import curve, loss_summary, read_run
from mixtral_run.train.data.sources import TrainingData
from mixtral_run.train.summary import Summary
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.describe import BaseDescription


@dataclass(frozen=True)
class RunRecord:
    """What a run is, as run.json and summary.json have it.

    Attributes:
        name: of the run, for people.
        id: tells runs of one name apart; a resumed run keeps it.
        started: UTC, ISO 8601, of the first start.
        kit: version and commit of the kit.
        base: fingerprint and path of the base.
        data: SHA-256 of --data-path (null for mock data and for a dataset on the hub), hash of all token ids, and a
            line each about the training and the validation data.
        settings: all settings of the run, with the layout that was chosen.
    """

    name: str
    id: str
    started: str
    kit: dict[str, Any]
    base: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: FinetuneConfig, base: BaseDescription, data: TrainingData) -> RunRecord:
        """Describe a run before its first iteration. A resumed run keeps the id and the start of its record."""
        known = read_run(config.save).run if config.resume else {}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(
            name=config.run_name or config.save.resolve().name,
            id=_text(known.get("id")) or secrets.token_hex(4),
            started=_text(known.get("started")) or now,
            kit=asdict(this_kit()),
            base={"fingerprint": base.fingerprint, "path": str(base.folder.resolve())},
            data={
                "sha256": data.sha256,
                "tokens": data.identity or None,
                "training": data.samples.describe(),
                "validation": data.validation.describe() if data.validation is not None else None,
            },
            settings=config.to_mapping(),
        )

    def write(self, save: Path) -> None:
        """Write run.json."""
        write_atomically(save / run_files.RUN, _json(asdict(self)))


def write_outcome(record: RunRecord, summary: Summary, save: Path, report: Report) -> None:
    """Write summary.json and loss.png. One process calls. A plot that cannot be drawn is reported and ends no run."""
    data = read_run(save)
    document = {**asdict(summary), "losses": loss_summary(data), **asdict(record)}
    write_atomically(save / run_files.SUMMARY, _json(document))
    try:
        training, validation = curve(data.metrics, "loss"), curve(data.validation, "loss")
        write_loss_plot(save / run_files.LOSS_PLOT, training, validation, title=f"Loss of {record.name}")
    except (OSError, ImportError) as error:
        report.warn(f"{save / run_files.LOSS_PLOT} was not written: {error}")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) < 100 and value.isprintable() else None

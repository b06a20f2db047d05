"""A cluster behind the STAND-IN for kubectl (tests/support/servers/standin_kubectl.py), and its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mixtral_run.cli.main import root
from mixtral_run.fleet.launchers.records import JobRecord, write_record

IMAGE = "registry.example.com/mixtral-run:0.2.0"
LAUNCH = (
    "finetune", "--load", "base", "--save", "adapter", "--mock-data", "--launcher", "kubernetes", "--image", IMAGE,
    "--volume", "pvc/checkpoints:/checkpoints",
)  # fmt: skip
STAMP = "2026-01-01T00:00:0{}.{}Z {}\n"


class StandIn:
    """The folder behind the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings()

    def settings(self, **values: Any) -> None:
        (self.folder / "settings.json").write_text(json.dumps(values))

    def steps(self, *steps: list[dict[str, Any]], stay: bool = False) -> None:
        (self.folder / "steps.json").write_text(json.dumps(steps))
        if stay:
            (self.folder / "steps.stay").touch()

    def output(self, name: str, *lines: str, lost_after: int | None = None) -> None:
        (self.folder / "logs" / name).write_text("".join(lines))
        if lost_after is not None:
            (self.folder / "logs" / f"{name}.lost").write_text(str(lost_after))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def applied(self) -> list[list[dict[str, Any]]]:
        files = sorted(self.folder.glob("applied-*.yaml"))
        return [list(yaml.safe_load_all(file.read_text())) for file in files]


def run(*words: str) -> None:
    root.main(list(words), standalone_mode=False, prog_name="mixtral-run")


def record(name: str = "finetune-1", nodes: int = 1, crd: str = "job", context: str = "here") -> JobRecord:
    found = JobRecord(
        name=name, launcher="kubernetes", verb="finetune", scheduler_id=f"{crd}/{name}", output="/checkpoints/adapter",
        submitted="2026-01-01T00:00:00",
        extra={
            "context": context, "namespace": "training", "crd": crd, "num_nodes": str(nodes),
            "container": "trainer" if crd == "job" else "node",
        },
    )  # fmt: skip
    write_record(found)
    return found


def line(second: int, text: str, fraction: str = "5") -> str:
    return STAMP.format(second, fraction, text)

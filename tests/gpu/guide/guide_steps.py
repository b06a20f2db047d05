"""One step of the guide's run: a command, watched; what it took beside the guide's figures and the wanted ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.support.gpu_memory import GpuMemory
from benchmarks.support.process_memory import FamilyMemory

ROOT = Path(__file__).resolve().parents[3]
SHOWN_LINES = 30
SAVE_SECONDS = 45
"""Seconds that a step whose time is up may take to save its state."""

GUIDES_GPUS = 8
MISTRAL_FINETUNE = 2966
"""Tokens a second and GPU of mistral-finetune on 8 H100, by its README."""
WANTED_GIB = {"TP2/EP4": 27.0, "TP1/EP8": 18.0}
"""Memory of one of 8 GPUs with mock data, as the guide gives it; by nvidia-smi."""


@dataclass
class Step:
    """One line of the table. outcome: passed, failed, out of time, or not run (why is in `reason`).

    Memory in GB and GiB as `process_memory` and `gpu_memory` count them, of all processes together and of each GPU.
    """

    name: str
    layout: str = ""
    outcome: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    peak_anonymous_gb: float = 0.0
    peak_resident_gb: float = 0.0
    peak_gpu_gib: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    guide: str = ""
    wanted: str = ""
    reached: dict[str, bool] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def run(step: Step, words: list[str], log: Path, limit_seconds: float) -> None:
    """Run `python words…` as the step, its output at the end of `log`, each line with the seconds since the step began.

    A failed one's last lines are shown.

    After `limit_seconds` it is asked to end, as by Ctrl-C's kin SIGTERM: training then saves. Never raises for what the
    command does.
    """
    began = log.stat().st_size if log.exists() else 0
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n=== {step.name} {step.layout}: {' '.join(words)}\n")
        output.flush()
        with (
            subprocess.Popen(
                [sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                cwd=ROOT,
            ) as process,
            _copied(process, output, started),
            GpuMemory(interval_ms=1000) as gpu,
            # Of dozens of processes with hundreds of threads each look takes a while.
            FamilyMemory(process, interval_seconds=0.1) as memory,
        ):
            in_time = _waited(process, limit_seconds)
    step.seconds = time.perf_counter() - started
    step.peak_anonymous_gb = memory.peak_anonymous_bytes / 1e9
    step.peak_resident_gb = memory.peak_resident_bytes / 1e9
    step.peak_gpu_gib = gpu.peak_gib
    step.outcome = ("passed" if process.returncode == 0 else "failed") if in_time else "out of time"
    if step.outcome != "passed":
        with log.open("rb") as file:
            file.seek(began)
            lines = file.read().decode(errors="replace").splitlines()
        step.reason = step.reason or f"exit code {process.returncode}"
        print("\n".join(f"  | {line}" for line in lines[-SHOWN_LINES:]), flush=True)


@contextmanager
def _copied(process: subprocess.Popen[str], output: IO[str], started: float) -> Iterator[None]:
    """Copies what the process prints, line by line, until all that hold its output have ended."""

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.write(f"{time.perf_counter() - started:7.2f}  {line}")
            output.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(SAVE_SECONDS)


def _waited(process: subprocess.Popen[str], limit_seconds: float) -> bool:
    """Return True if the process ended by itself in time. In any case it and all its children have ended."""
    import psutil

    try:
        process.wait(max(limit_seconds, 1.0))
        return True
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(SAVE_SECONDS)
        except subprocess.TimeoutExpired:
            end_family(psutil.Process(process.pid))
        return False
    except BaseException:
        end_family(psutil.Process(process.pid))
        raise


def end_family(process: Any) -> None:
    """Kill a process and all that it started."""
    import psutil

    for each in [process, *process.children(recursive=True)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def training_figures(folder: Path) -> dict[str, Any]:
    """Return the summary of a run, or the iterations so far of one that was cut off."""
    figures: dict[str, Any] = {}
    lines = [json.loads(line) for line in _text(folder / "metrics.jsonl").splitlines()]
    if lines:
        steady = sorted(lines[1:] or lines, key=lambda line: line["seconds"])
        middle = steady[len(steady) // 2]
        figures = {
            "iterations": len(lines),
            "first_loss": lines[0]["loss"],
            "last_loss": lines[-1]["loss"],
            "first_iteration_seconds": lines[0]["seconds"],
            "seconds_per_iteration": middle["seconds"],
            "tokens_per_second_per_process": middle["tokens_per_second_per_process"],
            "tflops_per_process": middle["tflops_per_process"],
            "peak_memory_gib": [max(line["peak_memory_gib"] for line in lines)],
        }
    summary = _text(folder / "summary.json")
    return figures | (json.loads(summary) if summary else {})


def reached(step: Step, num_gpus: int) -> dict[str, bool]:
    """Return the targets of a step on the full model, True where met. Memory counts on the GPUs of the guide only."""
    if step.name == "convert":
        gpu: float = step.figures["gpu_gib_taken"]
        return {"time": step.seconds < 100, "RAM": step.peak_resident_gb < 4, "GPU": gpu < 0.1}
    if step.name == "finetune, mock data":
        found = {"time": step.seconds < 60}
        if num_gpus == GUIDES_GPUS and step.layout in WANTED_GIB:
            found["GPU"] = max(step.peak_gpu_gib, default=0.0) <= WANTED_GIB[step.layout]
        return found
    if step.name == "finetune, real data":
        return {"speed": step.figures["tokens_per_second_per_process"] > MISTRAL_FINETUNE}
    return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def table(steps: list[Step]) -> str:
    """The steps beside the guide's figures and the wanted ones."""
    head = ["step", "layout", "outcome", "seconds", "RAM GB", "GPU GiB", "by torch", "tok/s/GPU", "4P TFLOP/s"]
    rows = [[*head, "guide", "wanted", "reached"], *(_row(step) for step in steps)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(step: Step) -> list[str]:
    verdict = ", ".join(f"{name} {'✓' if good else '✗'}" for name, good in step.reached.items())
    if step.outcome == "not run":
        return [step.name, step.layout, "not run", *[""] * 6, step.guide, step.wanted, step.reason]
    found = step.figures
    gpu = found.get("gpu_gib_taken", max(step.peak_gpu_gib, default=None))
    share = f" ({found['share_of_product']:.0%})" if "share_of_product" in found else ""
    return [
        step.name,
        step.layout,
        step.outcome,
        f"{step.seconds:.1f}",
        f"{step.peak_resident_gb:.1f}",
        f"{gpu:.1f}" if gpu is not None else "",
        f"{max(found['peak_memory_gib']):.1f}" if "peak_memory_gib" in found else "",
        f"{found['tokens_per_second_per_process']:,.0f}" if "tokens_per_second_per_process" in found else "",
        f"{found['tflops_4p']:,.1f}{share}" if "tflops_4p" in found else "",
        step.guide,
        step.wanted,
        verdict,
    ]

"""Steps of a trial run (rehearse, smoke), with the time, memory and outcome of each."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixtral_run.errors import CheckFailed, MixtralRunError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.io.files import write_atomically

SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class StepOutcome:
    """One row of the table. peak_memory_gib: peak of the memory that this program and its processes held together."""

    name: str
    passed: bool
    result: str
    seconds: float
    peak_memory_gib: float
    peak_gpu_memory_gib: float | None


class Steps:
    """Runs steps one after the other. After a failure the rest is not run, as each step needs the previous one."""

    def __init__(self, total: int, report: Report) -> None:
        self._total = total
        self._report = report
        self.outcomes: list[StepOutcome] = []

    @property
    def passed(self) -> bool:
        return len(self.outcomes) == self._total and all(outcome.passed for outcome in self.outcomes)

    def run(self, name: str, step: Callable[[], str]) -> None:
        """Run `step`, which returns a text about its result or raises MixtralRunError."""
        if self.outcomes and not self.outcomes[-1].passed:
            return
        self._report.say()
        self._report.step(len(self.outcomes) + 1, self._total, name)
        started = time.perf_counter()
        with MemoryWatch() as memory:
            try:
                result, passed = step(), True
            except MixtralRunError as error:
                result, passed = str(error), False
        seconds = time.perf_counter() - started
        self.outcomes.append(StepOutcome(name, passed, result, seconds, memory.peak_gib, memory.peak_gpu_gib))
        if passed:
            self._report.done(result)
        else:
            self._report.say(f"✗ {result}")

    def table(self, title: str) -> None:
        """Print all outcomes."""
        gpus = any(outcome.peak_gpu_memory_gib is not None for outcome in self.outcomes)
        columns = ["step", "", "result", "seconds", "peak RAM GB", *(["peak GPU GB"] if gpus else [])]
        rows = [
            [
                outcome.name,
                "✓" if outcome.passed else "✗",
                outcome.result.splitlines()[0],
                f"{outcome.seconds:.1f}",
                f"{outcome.peak_memory_gib * 1.073741824:.2f}",
                *([f"{(outcome.peak_gpu_memory_gib or 0) * 1.073741824:.2f}"] if gpus else []),
            ]
            for outcome in self.outcomes
        ]
        self._report.say()
        self._report.table(columns, rows, title)

    def write(self, path: Path, **more: Any) -> str:
        """Write the outcomes as JSON. Return the document."""
        steps = [asdict(outcome) for outcome in self.outcomes]
        document = json.dumps({"passed": self.passed, "steps": steps, **more}, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, document)
        return document

    def raise_if_failed(self, what: str, next_command: str | None = None) -> None:
        """Raise CheckFailed naming the failed step."""
        if self.passed:
            return
        failed: Sequence[StepOutcome] = [outcome for outcome in self.outcomes if not outcome.passed]
        raise CheckFailed(
            what, problems=[f"{outcome.name}: {outcome.result}" for outcome in failed], next_command=next_command
        )


class MemoryWatch:
    """Samples the memory of this process, its descendants and the GPUs while the block runs."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_gib = 0.0
        self.peak_gpu_gib: float | None = None

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            self.peak_gib = max(self.peak_gib, _resident_bytes(me) / 1024**3)
            used = _gpu_bytes()
            if used is not None:
                self.peak_gpu_gib = max(self.peak_gpu_gib or 0.0, used / 1024**3)
            if self._stop.wait(SAMPLE_SECONDS):
                return


def _resident_bytes(process: Any) -> int:
    """Return the resident bytes of a process and its descendants; shared memory counts once for each process."""
    import psutil

    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            # It ended after the listing.
            continue
    return total


def _gpu_bytes() -> int | None:
    """Return the memory in use on the fullest GPU, or None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    used = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        used.append(total - free)
    return max(used)

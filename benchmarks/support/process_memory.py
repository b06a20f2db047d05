"""Memory of a process and all that it started, watched from outside while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.02


class FamilyMemory:
    """Samples the memory of a family of processes.

    `peak_anonymous_bytes`: the most that all of them held together of memory that no file stands behind; shared pages
    such as /dev/shm are not anonymous. `peak_resident_bytes`: with what is mapped from files, libraries included.
    """

    def __init__(self, process: subprocess.Popen[str], interval_seconds: float = SAMPLE_SECONDS) -> None:
        self._process = process
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_anonymous_bytes = 0
        self.peak_resident_bytes = 0
        self._cpu_seconds: dict[int, float] = {}

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all of them, those that have ended included; unlike the time of a clock it is the same on a busy
        machine."""
        return sum(self._cpu_seconds.values())

    def __enter__(self) -> FamilyMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            family = [self._process.pid]
            for pid in family:
                family += _children(pid)
            now = [_memory(pid) for pid in family]
            self._cpu_seconds |= {pid: seconds for pid in family if (seconds := _cpu_seconds(pid))}
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, sum(one["RssAnon"] for one in now))
            self.peak_resident_bytes = max(self.peak_resident_bytes, sum(one["VmRSS"] for one in now))


def measured(command: list[str]) -> tuple[dict[str, Any], FamilyMemory]:
    """Run a command: the JSON object that its last line is, and the memory of all that it started.

    Raises SystemExit where it fails.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, FamilyMemory(process) as memory:
        output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}")
    return json.loads(output.splitlines()[-1]), memory


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        # The process ended between the listing and the look, as may a thread below.
        return found
    for thread in threads:
        try:
            found += [int(word) for word in (thread / "children").read_text().split()]
        except OSError:
            continue
    return found


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process in user and kernel mode so far; 0 for one that ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> Counter[str]:
    """Bytes by the kernel's names; nothing of a process that ended, or is ending."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return Counter()
    fields = [line.split() for line in lines if line.startswith(("RssAnon:", "VmRSS:"))]
    return Counter({words[0].rstrip(":"): int(words[1]) * 1024 for words in fields})

"""Memory of a process and all that it started, watched from outside while it runs."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

SAMPLE_SECONDS = 0.02


class AnonymousMemory:
    """Samples the anonymous memory (not the page cache, nothing mapped from files) of a family of processes.

    `peak_bytes`: the most that all of them held together. Shared pages such as /dev/shm are not anonymous.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            family = [self._process.pid]
            for pid in family:
                family += _children(pid)
            self.peak_bytes = max(self.peak_bytes, sum(_anonymous_bytes(pid) for pid in family))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in file.read_text().split()]
        except OSError:
            # The thread ended between the listing and the look.
            continue
    return found


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

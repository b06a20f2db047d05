"""Memory of each GPU, watched from outside with nvidia-smi while something runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading

_QUERY = ("nvidia-smi", "--format=csv,noheader,nounits", "--query-gpu")


def gpus() -> list[tuple[str, float, float]]:
    """Name, memory and what is in use of it, in GiB, of each GPU; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = [*_QUERY[:2], f"{_QUERY[2]}=name,memory.total,memory.used"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.rsplit(",", 2) for line in done.stdout.splitlines() if line.count(",") >= 2]
    return [(name, float(total) / 1024, float(used) / 1024) for name, total, used in rows]


class GpuMemory:
    """`peak_gib`: the most that was in use on each GPU at any sample, by all programs; empty without a GPU.

    Each sample holds the driver's locks, for which a program that launches many kernels waits.
    """

    def __init__(self, interval_ms: int = 100) -> None:
        self._interval_ms = interval_ms
        self._peaks: dict[int, float] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._terminal = -1
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> GpuMemory:
        if shutil.which("nvidia-smi") is not None:
            query = [*_QUERY[:2], f"{_QUERY[2]}=index,memory.used", f"--loop-ms={self._interval_ms}"]
            # A terminal, so that each line comes at once, however the program buffers its output.
            self._terminal, theirs = os.openpty()
            self._process = subprocess.Popen(query, stdout=theirs, stderr=subprocess.DEVNULL)
            os.close(theirs)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    @property
    def peak_gib(self) -> list[float]:
        return [self._peaks[index] for index in sorted(self._peaks)]

    def _read(self) -> None:
        with os.fdopen(self._terminal, encoding="ascii", errors="replace") as lines:
            try:
                for line in lines:
                    self.take(line)
            except OSError:
                # How Linux tells that nobody holds the other end any more.
                return

    def take(self, line: str) -> None:
        """Count a sample, a line `index, MiB`; lines of another form are no samples."""
        index, _, used = line.partition(",")
        if index.strip().isdigit() and used.strip().isdigit():
            number = int(index)
            self._peaks[number] = max(self._peaks.get(number, 0.0), int(used) / 1024)

"""A command line whose job takes its time to stop, as a run that saves a checkpoint does."""

import signal
import sys
import time
from pathlib import Path

from mixtral_run.cli import main as cli
from mixtral_run.launch import processes


def work(error_directory: str, ready: str, seconds: str) -> None:
    """Wait for a signal, and take `seconds` to stop."""
    del error_directory
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopping.append(number))
    Path(ready).with_suffix(f".{processes.rank()}").touch()
    while not stopping:
        time.sleep(0.01)
    time.sleep(float(seconds))
    Path(ready).with_suffix(f".saved{processes.rank()}").touch()
    sys.exit(processes.STOPPED)


def main() -> None:
    def job(**_: object) -> None:
        processes.start_processes(2, work, *sys.argv[1:])

    cli.root.main = job  # type: ignore[method-assign, assignment]
    cli.main()


if __name__ == "__main__":
    main()

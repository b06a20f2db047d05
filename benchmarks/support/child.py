"""A measurement in a process of its own, or in one a GPU: what it prints last, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def measured(words: Sequence[str], gpus: int = 1) -> dict[str, Any] | None:
    """The last line that `python words…` prints as a JSON object; None where there is none, and its output is shown."""
    launcher = [sys.executable]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            return result
    print(done.stdout[-2000:], done.stderr[-6000:], file=sys.stderr)
    return None

"""Read 100 simulated hosts, ten of which answer with damage, through the real command and a stand-in for ssh."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HOSTILE = Path(__file__).parents[1] / "unit" / "fleet" / "hostile"
SSH = """#!/bin/sh
# STAND-IN for ssh: each host answers every command with its file in $ANSWERS.
for last; do :; done
case " $* " in *" -G "*) printf 'hostname %s\\nport 22\\nuser ops\\n' "$last"; exit ;; esac
for word; do [ -f "$ANSWERS/$word" ] && exec cat "$ANSWERS/$word"; done
exit 255
"""


@dataclass(frozen=True)
class FleetOutcome:
    """Result of one reading. num_shown: good hosts that were shown as such. num_odd: faulty hosts shown as faulty."""

    num_hosts: int
    num_shown: int
    num_odd: int
    seconds: float
    peak_mib: int
    problems: tuple[str, ...]


def read_fleet(folder: Path, num_hosts: int = 100, num_faulty: int = 10, number: int = 0) -> FleetOutcome:
    """Run `mixtral-run status --json` on simulated hosts; `folder` must be empty."""
    answers, programs = folder / "answers", folder / "bin"
    answers.mkdir()
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    good, draw = (HOSTILE / "status_good.json").read_bytes(), random.Random(number)
    names = [f"gpu-{index:03}" for index in range(num_hosts)]
    faulty = set(draw.sample(names, num_faulty))
    for name in names:
        (answers / name).write_bytes(_damaged(good, draw) if name in faulty else good)
    environment = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "ANSWERS": str(answers),
        "XDG_STATE_HOME": str(folder / "state"),
    }  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "mixtral_run", "status", "--json", *names],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, errors = process.communicate()
    seconds = time.monotonic() - began
    problems = [] if b"Traceback" not in errors + output else [errors.decode(errors="replace")[-500:]]
    try:
        rows = {row["name"]: row for row in json.loads(output)}
    except ValueError as error:
        return FleetOutcome(num_hosts, 0, 0, seconds, 0, (*problems, f"not JSON: {error}"))
    fine = sum(name not in faulty and not rows[name]["error"] for name in names)
    odd = sum(bool(rows[name]["error"]) for name in faulty)
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return FleetOutcome(num_hosts, fine, odd, seconds, peak, tuple(problems))


def _damaged(good: bytes, draw: random.Random) -> bytes:
    cut = draw.randrange(1, len(good))
    return draw.choice((good[:cut], b"[" * 100_000, good.replace(b":", b";", 1), b"", b"\xff" * 1000, b'{"gpus": 8}'))

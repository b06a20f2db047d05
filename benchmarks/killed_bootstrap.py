"""A bootstrap that is killed at random points and run again: each host ends ready, and a further run changes nothing.

    python -m benchmarks.killed_bootstrap [--points 10] [--seed 1] [--minutes 60]

For each point a throw-away host is installed anew, its bootstrap is killed (with Ansible, not with what runs on the
host), and run again twice. A bootstrap that ended before its kill is looked at as well, but is no point. The last line
is one JSON object; the exit code is 1 if a host did not end as it must.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mixtral_run.fleet.testhosts import hosts, kit_image, repository
from mixtral_run.fleet.testhosts.__main__ import inventory
from mixtral_run.fleet.testhosts.disks import with_images
from mixtral_run.fleet.testhosts.engine import why_no_engine
from tests.support.processes.killed import killed_after

ROOT = Path(__file__).parents[1]
NAME = "killed-bootstrap"
DONE = re.compile(r"^✓ \S+\s+done\s+(\d+)\s+\d+", re.MULTILINE)


@dataclass
class Point:
    """The end of one host."""

    seconds: float
    was_killed: bool
    changed: int
    """Changes of the run after the kill; -1 if it failed."""
    changed_again: int

    @property
    def is_good(self) -> bool:
        return self.changed >= 0 and self.changed_again == 0


class Operator:
    """A state folder of its own, and the bootstrap of the host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "XDG_STATE_HOME": str(folder), "PYTHONPATH": str(ROOT)}

    def install(self) -> None:
        """Install the host anew."""
        hosts.reimage(NAME, disk=with_images("bookworm"))
        (self.folder / "hosts.json").write_text(json.dumps(inventory([NAME])))

    def words(self) -> list[str]:
        settings = {
            "image_source": "archive", "image_archive": kit_image.LAYERS_ON_HOST, "image_archive_on_host": True,
            "image_archive_name": kit_image.ARCHIVE_NAME, "preflight_num_gpus": 0,
        }  # fmt: skip
        words = ["bootstrap", "-i", str(self.folder / "hosts.json"), "-e", json.dumps(settings)]
        return [sys.executable, "-m", "mixtral_run", *words, "--accept-new-host-key", NAME]

    def run(self) -> int:
        """Run bootstrap and return the number of changes; print its output and return -1 if it fails."""
        done = subprocess.run(
            self.words(), cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        found = DONE.search(done.stdout)
        if done.returncode or not found:
            print(done.stdout[-4000:] + done.stderr[-2000:], file=sys.stderr)
            return -1
        return int(found.group(1))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed_bootstrap", description=__doc__)
    parser.add_argument("--points", type=int, default=10, help="number of hosts and kills [default: 10]")
    parser.add_argument("--seed", type=int, default=1, help="seed of the points [default: 1]")
    parser.add_argument("--minutes", type=float, default=60, help="no new point after this time [default: 60]")
    words = parser.parse_args(argv)
    reason = why_no_engine()
    if reason:
        print(f"✗ {reason}", file=sys.stderr)
        return 3
    try:
        with tempfile.TemporaryDirectory(prefix="mixtral-run-killed-") as folder:
            end = time.monotonic() + 60 * words.minutes
            points = _measure(Operator(Path(folder)), words.points, random.Random(words.seed), end)
    finally:
        hosts.remove(NAME)
        repository.stop_unless_used()
    good = sum(point.is_good for point in points)
    kills = sum(point.was_killed for point in points)
    print(json.dumps({"kills": kills, "good": good, "points": [asdict(point) for point in points]}))
    return 0 if all(point.is_good for point in points) else 1


def _measure(operator: Operator, count: int, chance: random.Random, end: float) -> list[Point]:
    kit_image.image_archive()
    operator.install()
    began = time.monotonic()
    if operator.run() <= 0:
        raise RuntimeError("the bootstrap fails without a kill")
    whole = time.monotonic() - began
    print(f"a whole bootstrap: {whole:.0f} s", flush=True)
    points: list[Point] = []
    while sum(point.was_killed for point in points) < count and time.monotonic() < end:
        operator.install()
        seconds = chance.uniform(1, whole)
        was_killed = killed_after(seconds, operator.words(), operator.folder, operator.environment)
        point = Point(round(seconds, 1), was_killed, operator.run(), operator.run())
        points.append(point)
        print(f"{len(points):3}: {'✓' if point.is_good else '✗'} {point}", flush=True)
    return points


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

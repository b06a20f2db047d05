"""`make mutants`: change one place of a module at a time, run its unit tests, and list the changes that none noticed.

cosmic-ray makes the changes, in a copy of the working tree. One pytest collects the tests of a room and forks for every
change. Each runs only the tests that run its line, the fastest first, until one fails. A change of what runs when a
module is imported takes a pytest that has not imported it, and the tests that run or name the module.

A sample is drawn at random, by a seed: each possible change of a room is as likely as any other. Exit code 1 if fewer
than the wanted share was noticed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.rooms import ROOMS
from tests.mutants.trial import try_room


@dataclass(frozen=True)
class Outcome:
    """Result of the mutants of a room. possible: how many there are. survivors: each with its changed line."""

    room: str
    possible: int
    tried: int
    survivors: tuple[str, ...]


def main(words: Sequence[str] | None = None) -> int:
    """Run a sample, print each survivor, and then a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("rooms", nargs="*", help=f"default: all. {', '.join(ROOMS)}")
    parser.add_argument("--number", type=int, default=40, help="mutants of each room at most; 0: all")
    parser.add_argument("--minutes", type=float, default=60, help="end after this time, with what there is then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="rooms side by side")
    parser.add_argument("--least", type=float, default=0.9, help="share that has to be noticed")
    given = parser.parse_args(words)
    unknown = sorted(set(given.rooms) - set(ROOMS))
    if unknown:
        parser.error(f"expected names of rooms; found {', '.join(unknown)}")
    outcomes = _try_rooms(given)
    table(outcomes)
    tried = sum(each.tried for each in outcomes)
    noticed = tried - sum(len(each.survivors) for each in outcomes)
    return 0 if all(each.tried for each in outcomes) and noticed >= given.least * tried else 1


def _try_rooms(given: argparse.Namespace) -> list[Outcome]:
    """Try each room in a fork of its own, some side by side."""
    end = time.monotonic() + 60 * given.minutes
    rooms = given.rooms or list(ROOMS)
    preload()
    with tempfile.TemporaryDirectory() as folder:
        waiting, running = list(rooms), set[int]()
        while waiting or running:
            if time.monotonic() > end:
                waiting.clear()
            while waiting and len(running) < given.jobs:
                room = waiting.pop(0)
                # Where rooms wait, each has its part of the time.
                share = min(1.0, given.jobs / (len(waiting) + 1))
                running.add(_start(room, Path(folder) / room, given, end, share))
            if running:
                ended, _ = os.wait()
                running.discard(ended)
        answers = [Path(folder) / each / "outcome.json" for each in rooms]
        return [
            Outcome(**json.loads(each.read_text("utf-8"))) if each.is_file() else Outcome(each.parent.name, 0, 0, ())
            for each in answers
        ]


def _start(room: str, folder: Path, given: argparse.Namespace, end: float, share: float) -> int:
    folder.mkdir()
    child = os.fork()
    if child:
        return child
    try:
        possible, tried, survivors = try_room(room, folder, given.number, given.seed, end, share)
        outcome = Outcome(room, possible, tried, tuple(survivors))
        (folder / "outcome.json").write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")
        os._exit(0)
    except BaseException as error:
        print(f"{room}: {error!r}", flush=True)
        os._exit(1)


def preload() -> None:
    """Import what is slow to import and is never changed. Nothing of the product is among it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import megatron.core.dist_checkpointing
    import numpy
    import pytest
    import torch.distributed.checkpoint
    import transformers

    del megatron, numpy, pytest, torch, transformers


def table(outcomes: Sequence[Outcome]) -> None:
    """Print the table of docs/reliability.md."""
    print("\n| room | possible | tried | noticed |\n|---|---|---|---|")
    for each in outcomes:
        noticed = each.tried - len(each.survivors)
        share = f"{noticed} ({100 * noticed / each.tried:.0f} %)" if each.tried else "-"
        print(f"| `{ROOMS[each.room][0]}` | {each.possible:,} | {each.tried} | {share} |")
    tried, survived = sum(each.tried for each in outcomes), sum(len(each.survivors) for each in outcomes)
    share = f"{tried - survived} ({100 * (tried - survived) / max(tried, 1):.0f} %)"
    print(f"| all | {sum(each.possible for each in outcomes):,} | {tried} | {share} |")


if __name__ == "__main__":
    sys.exit(main())

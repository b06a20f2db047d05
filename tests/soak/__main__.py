"""`make soak`: a table of what survived, for docs/reliability.md. Exit code 1 if something did not."""

from __future__ import annotations

import argparse
import itertools
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from mixtral_run import __version__
from tests.soak.bootstraps import SECONDS_TO_END, Bootstraps
from tests.soak.fleet import read_fleet
from tests.soak.fuzz import fuzz
from tests.soak.kills import Kills, kill_conversions, kill_trainings

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table of make soak -->", "<!-- end of the table -->"
Row = tuple[str, str, str]


def main() -> int:
    """Run everything within the time; print the table, and write it into the document if asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="end after this time, with what there is then")
    parser.add_argument("--kills", type=int, default=100, help="kills of each verb")
    parser.add_argument("--bootstraps", type=int, default=20, help="kills of a host's first bootstrap")
    parser.add_argument("--inputs", type=int, default=100_000, help="damaged inputs over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    arguments = parser.parse_args()
    began = time.monotonic()
    rows: list[Row] = []
    problems: list[str] = []
    minutes = max(arguments.minutes - SECONDS_TO_END / 60, 0)
    with (
        tempfile.TemporaryFile() as log,
        Bootstraps(log, arguments.bootstraps, arguments.seed, minutes) as bootstraps,
    ):
        for row, found in itertools.chain(_parts(arguments, began), bootstraps.rows()):
            rows.append(row)
            problems += found
            say(row)
    for problem in problems:
        print(f"✗ {problem}", file=sys.stderr)
    if arguments.write:
        write(rows, time.monotonic() - began)
    return 1 if problems else 0


def _parts(arguments: argparse.Namespace, began: float) -> Iterator[tuple[Row, list[str]]]:
    """Run each part that needs no host; yield its row, and its problems."""
    end = began + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        fleet = read_fleet(Path(folder), number=arguments.seed)
    whole = fleet.num_shown == 90 and fleet.num_odd == 10
    row = (
        f"`status` of {fleet.num_hosts} simulated hosts, 10 of them faulty", f"{fleet.num_shown + fleet.num_odd}",
        f"{fleet.num_shown} shown, {fleet.num_odd} named as faulty, {fleet.seconds:.1f} s",
    )  # fmt: skip
    yield row, [*fleet.problems, *(() if whole else ("fleet: a host is shown wrongly",))]
    for outcome in fuzz(arguments.inputs, arguments.seed, end):
        number = len(outcome.failures)
        result = f"{number} kinds of failure" if number else "0 tracebacks, none over 5 s"
        row = (f"damaged input: {outcome.name}", f"{outcome.num_inputs:,}", result)
        yield row, [f"{outcome.name}: {failure}" for failure in outcome.failures]
    with tempfile.TemporaryDirectory() as folder:
        half = time.monotonic() + (end - time.monotonic()) / 3
        for kill, until in ((kill_conversions, half), (kill_trainings, end)):
            kills = kill(Path(folder), arguments.kills, until, arguments.seed)
            count = f"{kills.kills} kills" + (f", {kills.in_saves} in a save" if kills.in_saves else "")
            row = (f"`{kills.name}` killed and run again", count, _outcome(kills))
            yield row, [f"{kills.name}: {problem}" for problem in kills.problems]


def _outcome(kills: Kills) -> str:
    same = f"{kills.trials} runs, each ended with the files of an undisturbed one"
    return same if not kills.problems else f"{kills.trials} runs, {len(kills.problems)} problems"


def say(row: Row) -> None:
    """Print one row at once: the whole takes minutes."""
    print(f"{row[0]:55} {row[1]:>12}  {row[2]}", flush=True)


def write(rows: list[Row], seconds: float) -> None:
    """Replace the table in the document."""
    head = f"mixtral-run {__version__}, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {seconds / 60:.0f} minutes:"
    lines = [
        BEGIN,
        head,
        "",
        "| what | how often | outcome |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = DOCUMENT.read_text(encoding="utf-8")
    table = "\n".join([*lines, END])
    DOCUMENT.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

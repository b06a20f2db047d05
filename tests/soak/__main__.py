"""`make soak`: a table of what survived, for docs/reliability.md. Exit code 1 if something did not."""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from mixtral_run import __version__
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
    parser.add_argument("--inputs", type=int, default=100_000, help="damaged inputs over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    arguments = parser.parse_args()
    began = time.monotonic()
    end = began + 60 * arguments.minutes
    rows, problems = [], []
    with tempfile.TemporaryDirectory() as folder:
        found = read_fleet(Path(folder), number=arguments.seed)
        whole = found.num_shown == 90 and found.num_odd == 10
        problems += [*found.problems, *(() if whole else ("fleet: a host is shown wrongly",))]
        rows.append(
            (f"`status` of {found.num_hosts} simulated hosts, 10 of them faulty", f"{found.num_shown + found.num_odd}",
             f"{found.num_shown} shown, {found.num_odd} named as faulty, {found.seconds:.1f} s")
        )  # fmt: skip
    say(rows[-1])
    for outcome in fuzz(arguments.inputs, arguments.seed, began + 30 * arguments.minutes):
        problems += [f"{outcome.name}: {failure}" for failure in outcome.failures]
        number = len(outcome.failures)
        result = f"{number} kinds of failure" if number else "0 tracebacks, none over 5 s"
        rows.append((f"damaged input: {outcome.name}", f"{outcome.num_inputs:,}", result))
        say(rows[-1])
    with tempfile.TemporaryDirectory() as folder:
        half = time.monotonic() + (end - time.monotonic()) / 3
        for kills in (
            kill_conversions(Path(folder), arguments.kills, half, arguments.seed),
            kill_trainings(Path(folder), arguments.kills, end, arguments.seed),
        ):
            problems += [f"{kills.name}: {problem}" for problem in kills.problems]
            number = f"{kills.kills} kills" + (f", {kills.in_saves} in a save" if kills.in_saves else "")
            rows.append((f"`{kills.name}` killed and run again", number, _outcome(kills)))
            say(rows[-1])
    for problem in problems:
        print(f"✗ {problem}", file=sys.stderr)
    if arguments.write:
        write(rows, time.monotonic() - began)
    return 1 if problems else 0


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

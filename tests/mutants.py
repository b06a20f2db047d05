"""`make mutants`: change one place of a module at a time, run its unit tests, and list the changes that none noticed.

cosmic-ray makes the changes. They are applied to a copy of the working tree, one after another. A process that has
imported torch and pytest once forks for each of them: starting them anew would take longer than the tests.

A sample is drawn at random, by a seed. Exit code 1 if fewer than the wanted share was noticed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNIT = "tests/unit"

ROOMS: dict[str, tuple[str, str]] = {
    "mapping": ("mixtral_run/weights/mapping", "weights/mapping weights/load"),
    "torch_dist": ("mixtral_run/weights/torch_dist", "weights/torch_dist weights/load weights/mapping"),
    "load": ("mixtral_run/weights/load", "weights/load"),
    "adapter": ("mixtral_run/weights/adapter", "weights/adapter weights/manifest model/test_lora.py"),
    "io": ("mixtral_run/weights/io", "weights/io weights/convert train/test_save_order.py"),
    "data": ("mixtral_run/train/data", "train/data train/test_validation.py"),
    "lr_schedule": ("mixtral_run/train/lr_schedule.py", "train/test_lr_schedule.py"),
    "checkpoints": (
        "mixtral_run/train/checkpoints",
        "train/test_save_order.py train/test_bad_steps.py train/test_run_folder.py train/test_fill_from_peft.py "
        "train/test_save_in_background.py",
    ),
    "step": (
        "mixtral_run/train/steps/step.py",
        "train/test_step_arithmetic.py train/test_step.py train/test_bad_steps.py",
    ),
    "planner": ("mixtral_run/planner", "planner"),
    "ssh": ("mixtral_run/fleet/ssh", "fleet/ssh fleet/test_secret_files.py fleet/test_hostile_hosts.py"),
    "secrets": ("mixtral_run/fleet/secrets.py", "fleet/test_secrets.py fleet/test_secret_files.py"),
    "jobs": ("mixtral_run/fleet/jobs", "fleet/jobs fleet/test_hostile_hosts.py"),
    "host": ("plugins/module_utils/mixtral_run_host", "host"),
}
"""What is changed, and the unit tests that are run against it."""

BASELINE_SECONDS = 600
Span = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Mutant:
    """One change: cosmic-ray's operator at its n-th occurrence in a module."""

    module: str
    operator: str
    occurrence: int
    line: int
    arguments: str

    def describe(self) -> str:
        return f"{self.module}:{self.line} {self.operator.removeprefix('core/')}"


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
    parser.add_argument(
        "--seconds",
        type=float,
        default=120,
        help="a change whose tests take longer, and 5 times as long as without it, counts as noticed",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.9, help="share that has to be noticed")
    given = parser.parse_args(words)
    unknown = sorted(set(given.rooms) - set(ROOMS))
    if unknown:
        parser.error(f"expected names of rooms; found {', '.join(unknown)}")
    end = time.monotonic() + 60 * given.minutes
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        copy_tree(copy)
        preload()
        rooms = given.rooms or list(ROOMS)
        for number, room in enumerate(rooms):
            until = time.monotonic() + (end - time.monotonic()) / (len(rooms) - number)
            outcomes.append(try_room(room, copy, given.number, given.seed, until, given.seconds))
    table(outcomes)
    tried = sum(each.tried for each in outcomes)
    noticed = tried - sum(len(each.survivors) for each in outcomes)
    return 0 if all(each.tried for each in outcomes) and noticed >= given.least * tried else 1


def copy_tree(copy: Path) -> None:
    """Copy what git tracks, and new files that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def preload() -> None:
    """Import what is slow to import and is never changed. Nothing of this project is among it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import megatron.core.dist_checkpointing
    import numpy
    import pytest
    import torch.distributed.checkpoint
    import transformers

    del megatron, numpy, pytest, torch, transformers


def modules_of(room: str, copy: Path) -> list[Path]:
    """Return the modules of a room in the copy."""
    place = copy / ROOMS[room][0]
    return [place] if place.is_file() else sorted(each for each in place.rglob("*.py") if each.name != "__init__.py")


def mutants_of(module: Path, copy: Path) -> list[Mutant]:
    """Return all changes of a module that cosmic-ray knows, without those that change nothing that runs."""
    from cosmic_ray.commands.init import _all_work_items

    ignored = _ignored(ast.parse(module.read_text(encoding="utf-8")))
    found = []
    for item in _all_work_items([module], {}):
        (change,) = item.mutations
        if any(first <= change.start_pos < last for first, last in ignored):
            continue
        name = str(module.relative_to(copy))
        arguments = json.dumps(change.operator_args)
        found.append(Mutant(name, change.operator_name, change.occurrence, change.start_pos[0], arguments))
    return found


def _ignored(tree: ast.Module) -> list[Span]:
    """Return the places of annotations, which are not evaluated, of decorators of dataclasses, and of assertions."""
    places: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            places.append(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            places.append(node.returns)
        elif isinstance(node, ast.ClassDef):
            places += node.decorator_list
        elif isinstance(node, ast.Assert) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            places.append(node)
    # cosmic-ray counts the @ as part of a decorator.
    return [
        ((each.lineno, each.col_offset - 1), (each.end_lineno, each.end_col_offset))  # type: ignore[attr-defined]
        for each in places
    ]


def try_room(room: str, copy: Path, number: int, seed: int, until: float, seconds: float) -> Outcome:
    """Try a sample of a room's mutants until a time."""
    tests = [f"{UNIT}/{each}" for each in ROOMS[room][1].split()]
    possible = [mutant for module in modules_of(room, copy) for mutant in mutants_of(module, copy)]
    sample = random.Random(f"{seed} {room}").sample(possible, min(number or len(possible), len(possible)))
    began = time.monotonic()
    if not passes(copy, tests, BASELINE_SECONDS, baseline=True):
        print((copy.parent / "output.txt").read_text(encoding="utf-8", errors="replace")[-2000:])
        print(f"{room}: the tests fail without any change: python -m pytest {' '.join(tests)}", flush=True)
        return Outcome(room, len(possible), 0, ())
    print(f"{room}: {len(possible):,} possible, tests take {time.monotonic() - began:.0f} s", flush=True)
    seconds = max(seconds, 5 * (time.monotonic() - began))
    tried, num_late, survivors = 0, 0, []
    for mutant in sample:
        if time.monotonic() > until:
            break
        with applied(mutant, copy) as change:
            if change is None:
                continue
            tried += 1
            passed = passes(copy, tests, seconds)
            num_late += passed is None
            if passed:
                survivors.append(f"{mutant.describe()}: {change}")
                print(f"  survived: {survivors[-1]}", flush=True)
    print(f"{room}: {tried - len(survivors)} of {tried} noticed, {num_late} of them by the time limit", flush=True)
    return Outcome(room, len(possible), tried, tuple(survivors))


@contextlib.contextmanager
def applied(mutant: Mutant, copy: Path) -> Iterator[str | None]:
    """Apply a change for the time of a block. Yield the old and the new text, or None if nothing was changed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = copy / mutant.module
    before, times = path.read_text(encoding="utf-8"), path.stat()
    after = mutate_code(before, get_operator(mutant.operator)(**json.loads(mutant.arguments)), mutant.occurrence)
    if after is None or after == before:
        yield None
        return
    path.write_text(after, encoding="utf-8")
    changed = [(old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=False) if old != new]
    try:
        yield " → ".join(f"`{' '.join(each.split())}`" for each in changed[0]) if changed else "a line was removed"
    finally:
        path.write_text(before, encoding="utf-8")
        # Python takes the compiled module of the first run again only if the time is the same.
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def passes(copy: Path, tests: Sequence[str], seconds: float, *, baseline: bool = False) -> bool | None:
    """Run the tests of the copy in a fork of this process. Return whether all passed, or None if the time ran out."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_run_tests(copy, tests, baseline))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_tests(copy: Path, tests: Sequence[str], baseline: bool) -> int:
    """Return pytest's exit code. Runs in the child, which has its own group of processes."""
    import pytest

    try:
        os.setpgid(0, 0)
        os.chdir(copy)
        with (copy.parent / "output.txt").open("wb") as output:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
        # A changed module that was compiled would be taken again after it was restored.
        sys.dont_write_bytecode = not baseline
        sys.path[:] = [str(copy), *(each for each in sys.path if Path(each or ".").resolve() != ROOT)]
        for name in [each for each in sys.modules if re.match(r"(tests|mixtral_run)(\.|$)", each)]:
            del sys.modules[name]
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--show-capture=no", *tests]))
    except BaseException:
        return 1


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

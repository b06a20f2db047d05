"""The modules that are changed, the unit tests that are run against them, and the changes that are possible."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNIT = "tests/unit"
Span = tuple[tuple[int, int], tuple[int, int]]

ROOMS: dict[str, tuple[str, str]] = {
    "mapping": ("mixtral_run/weights/mapping", "weights/mapping weights/load weights/adapter"),
    "torch_dist": ("mixtral_run/weights/torch_dist", "weights/torch_dist weights/load"),
    "load": ("mixtral_run/weights/load", "weights/load"),
    "adapter": ("mixtral_run/weights/adapter", "weights/adapter"),
    "io": (
        "mixtral_run/weights/io",
        "weights/io weights/convert test_run_lock.py train/checkpoints/test_save_order.py",
    ),
    "data": ("mixtral_run/train/data", "train/data train/test_validation.py train/test_preferences.py"),
    "lr_schedule": ("mixtral_run/train/lr_schedule.py", "train/test_lr_schedule.py"),
    "checkpoints": (
        "mixtral_run/train/checkpoints",
        "train/checkpoints train/steps/test_bad_steps.py train/test_fill_from_peft.py",
    ),
    "step": ("mixtral_run/train/steps/step.py", "train/steps"),
    "planner": ("mixtral_run/planner", "planner"),
    "ssh": ("mixtral_run/fleet/ssh", "fleet/ssh fleet/test_secret_files.py"),
    "secrets": ("mixtral_run/fleet/secrets.py", "fleet/test_secrets.py fleet/test_secret_files.py"),
    "jobs": ("mixtral_run/fleet/jobs", "fleet/jobs"),
    "host": (
        "plugins/module_utils/mixtral_run_host",
        "host/apt host/checks host/engine host/gpu host/models host/spread host/test_history.py "
        "host/test_owned_folders.py host/test_preflight_clock.py host/test_secret_modes.py host/test_swap_file.py",
    ),
}
"""What is changed, and the unit tests that are run against it."""


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


def modules_of(room: str, copy: Path) -> list[Path]:
    """Return the modules of a room in the copy."""
    place = copy / ROOMS[room][0]
    return [place] if place.is_file() else sorted(each for each in place.rglob("*.py") if each.name != "__init__.py")


def tests_of(room: str) -> list[str]:
    """Return the unit tests of a room."""
    return [f"{UNIT}/{each}" for each in ROOMS[room][1].split()]


def sample_of(room: str, copy: Path, number: int, seed: int) -> tuple[list[Mutant], int]:
    """Return a random sample of the changes of a room, each as likely as any other, and how many there are."""
    possible = [mutant for module in modules_of(room, copy) for mutant in mutants_of(module, copy)]
    chosen = random.Random(f"{seed} {room}").sample(possible, min(number or len(possible), len(possible)))
    return chosen, len(possible)


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


@contextlib.contextmanager
def applied(mutant: Mutant, copy: Path) -> Iterator[str | None]:
    """Apply a change for the time of a block. Yield the old and the new text, or None if nothing was changed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = copy / mutant.module
    before, times = path.read_text(encoding="utf-8"), path.stat()
    try:
        after = mutate_code(before, get_operator(mutant.operator)(**json.loads(mutant.arguments)), mutant.occurrence)
    except AttributeError:  # cosmic-ray cannot replace an exception whose name has a dot
        after = None
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

"""The modules that are changed, the unit tests that are run against them, and the changes that are possible."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.left_out import kind_of, places_of

ROOT = Path(__file__).parents[2]
UNIT = "tests/unit"

ROOMS: dict[str, tuple[str, str]] = {
    "mapping": ("mixtral_run/weights/mapping", "weights/mapping weights/load weights/adapter"),
    "torch_dist": ("mixtral_run/weights/torch_dist", "weights/torch_dist weights/load"),
    "load": ("mixtral_run/weights/load", "weights/load"),
    "adapter": ("mixtral_run/weights/adapter", "weights/adapter"),
    "io": (
        "mixtral_run/weights/io",
        "weights/io weights/convert test_run_lock.py train/checkpoints/test_save_order.py",
    ),
    "data": (
        "mixtral_run/train/data/*.py",
        "train/data/test_examples.py train/data/test_nothing_in_silence.py train/data/test_packing.py "
        "train/data/samples train/data/test_samples.py train/data/test_sources.py train/data/test_split.py "
        "train/data/test_token_cache.py train/test_iterations.py train/test_preferences.py train/preferences",
    ),
    "data_cache": (
        "mixtral_run/train/data/cache",
        "train/data/cache train/data/test_examples.py train/data/test_nothing_in_silence.py "
        "train/data/test_sources.py train/data/test_token_cache.py train/data/test_tokenize.py",
    ),
    "data_check": (
        "mixtral_run/train/data/check",
        "train/data/test_check.py train/data/test_check_screen.py train/data/test_preference_records.py",
    ),
    "data_reading": ("mixtral_run/train/data/reading", "train/data train/test_preferences.py"),
    "data_templates": ("mixtral_run/train/data/templates", "train/data train/test_example_texts.py"),
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
        "host/apt host/checks host/engine host/gpu host/models host/spread host/test_folder_owners.py "
        "host/test_history.py host/test_owned_folders.py host/test_preflight_clock.py host/test_secret_modes.py "
        "host/test_swap_file.py",
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
    name = ROOMS[room][0]
    found = copy.glob(name) if name.endswith(".py") else (copy / name).rglob("*.py")
    return sorted(each for each in found if each.name != "__init__.py")


def tests_of(room: str) -> list[str]:
    """Return the unit tests of a room."""
    return [f"{UNIT}/{each}" for each in ROOMS[room][1].split()]


def sample_of(room: str, copy: Path, number: int, seed: int) -> tuple[list[Mutant], int]:
    """Return a random sample of the changes of a room, each as likely as any other, and how many there are."""
    possible = [mutant for module in modules_of(room, copy) for mutant in mutants_of(module, copy)]
    chosen = random.Random(f"{seed} {room}").sample(possible, min(number or len(possible), len(possible)))
    return chosen, len(possible)


def mutants_of(module: Path, copy: Path) -> list[Mutant]:
    """Return all changes of a module that cosmic-ray knows, without those of a kind that is left out."""
    from cosmic_ray.commands.init import _all_work_items

    places = places_of(module.read_text(encoding="utf-8"))
    found = []
    for item in _all_work_items([module], {}):
        (change,) = item.mutations
        if kind_of(places, change.start_pos, change.operator_name) is not None:
            continue
        name = str(module.relative_to(copy))
        arguments = json.dumps(change.operator_args)
        found.append(Mutant(name, change.operator_name, change.occurrence, change.start_pos[0], arguments))
    return found


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

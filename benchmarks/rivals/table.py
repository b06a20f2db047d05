"""The trainers that benchmarks/lora.py measures next to this kit: what each needs, and where it is built.

Nothing of them is shipped. unsloth_zoo is under the AGPL: it is installed for the measurement only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

OLD_NAMES = {"peer": "hf"}
"""Former names of sides that --sides still takes."""


@dataclass(frozen=True)
class Rival:
    """A trainer that is measured as its users run it."""

    title: str
    packages: tuple[str, ...]
    """Distributions whose versions are reported, the trainer's own first."""
    needed: tuple[str, ...]
    """Further distributions that it imports."""
    module: str
    """The module with its `prepare`."""
    pins: tuple[str, ...] = ()
    """Requirements for pip where the newest version does not do."""

    @property
    def pip(self) -> str:
        """Return the command that installs the rival and leaves torch as it is."""
        pinned = {each.split("==")[0].split("<")[0]: each for each in self.pins}
        names = [pinned.get(name, name) for name in (*self.packages, *self.needed)]
        return "pip install --no-deps " + " ".join(f"'{name}'" if "<" in name else name for name in names)


HF = ("accelerate", "transformers", "peft")
RIVALS = {
    "hf": Rival(
        "HF transformers + PEFT",
        ("transformers", "peft"),
        ("accelerate",),
        "benchmarks.rivals.with_hf",
    ),
    "unsloth": Rival(
        "Unsloth",
        ("unsloth", "unsloth_zoo"),
        ("trl", "datasets", "dill", "multiprocess", "cut_cross_entropy", "bitsandbytes", *HF),
        "benchmarks.rivals.with_unsloth",
        ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "datasets<5", "trl==1.14.1", "transformers<=5.17"),
    ),
    "axolotl": Rival(
        "axolotl",
        ("axolotl", "liger-kernel"),
        (
            "trl",
            "datasets",
            "dill",
            "multiprocess",
            "pydantic",
            "pydantic-core",
            "typing-inspection",
            "addict",
            "bitsandbytes",
            *HF,
        ),
        "benchmarks.rivals.with_axolotl",
        ("axolotl==0.21.0", "liger-kernel==0.8.4", "trl==1.14.1"),
    ),
}
SIDES = ("ours", *RIVALS)


def sides_of(words: str) -> tuple[str, ...]:
    """Return the sides that a comma-separated list names. Raises ValueError for one that does not exist."""
    sides = tuple(OLD_NAMES.get(word, word) for word in words.split(","))
    if wrong := [side for side in sides if side not in SIDES]:
        raise ValueError(f"expected {', '.join(SIDES)}, separated by commas; found {', '.join(wrong)}")
    return sides


def versions(side: str) -> dict[str, str]:
    """Return the versions of a rival's packages; those that are not installed are left out."""
    found = {}
    for name in RIVALS[side].packages if side in RIVALS else ():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def require(sides: Sequence[str]) -> None:
    """Raise SystemExit with the pip commands of all rivals among the sides that lack a package."""
    problems = []
    for side in sides:
        if side not in RIVALS:
            continue
        rival = RIVALS[side]
        missing = [name for name in (*rival.packages, *rival.needed) if not _installed(name)]
        if missing:
            problems.append(f"{side}: not installed: {', '.join(missing)}. Install with:\n    {rival.pip}")
    if problems:
        raise SystemExit("\n".join(problems))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def fastest(found: dict[str, dict[str, float]]) -> str | None:
    """Return the rival with the most tokens a second; None if no rival has a rate."""
    rates = {side: row["tok_s"] for side, row in found.items() if side in RIVALS and row["tok_s"] == row["tok_s"]}
    return max(rates, key=rates.__getitem__) if rates else None

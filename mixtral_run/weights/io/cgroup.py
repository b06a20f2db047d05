"""Memory that the control groups of this process leave free: the limits of a container, a pod or a Slurm job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Names:
    """Files of the memory controller in one version of cgroups.

    inactive: the entry of memory.stat for the page cache that the kernel drops first; such pages count as used.
    """

    limit: str
    usage: str
    inactive: str


_V2 = _Names("memory.max", "memory.current", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_in_cgroups() -> int | None:
    """Return the least bytes that a control group with a limit leaves free, from this process's own up to the root.

    None without a limit, or if no limit can be read. Page cache that is not in active use counts as free.
    """
    own = _own_paths()
    found = [
        free
        for root, names, path in ((_ROOT, _V2, own.get("")), (_ROOT / "memory", _V1, own.get("memory")))
        for folder in _up_to(root, path)
        if (free := _free_in(folder, names)) is not None
    ]
    return min(found, default=None)


def _own_paths() -> dict[str, str]:
    """Return the path of this process's control group by controller; "" is the one of version 2. man 7 cgroups."""
    try:
        lines = _OWN.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return {controller: path for _, controllers, path in fields for controller in controllers.split(",")}


def _up_to(root: Path, path: str | None) -> Iterator[Path]:
    """Yield the folders from a control group up to the root.

    A container may see its own group as the root, and a path that only the host has, or that leads out of it.
    """
    parts = [each for each in (path or "").split("/") if each]
    parts = [] if ".." in parts else parts
    for count in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:count])


def _free_in(folder: Path, names: _Names) -> int | None:
    """Return the bytes that are free in one control group; None if it has no limit."""
    limit = _number(folder / names.limit)
    if limit is None:
        return None
    used = _number(folder / names.usage) or 0
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        lines = []
    reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith(f"{names.inactive} "))
    return max(0, limit - max(0, used - reclaimable))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

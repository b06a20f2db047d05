"""Symbolic links that a host names in what it sends for `fetch`. They are checked together and created last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mixtral_run.fleet.untrusted import MAX_PATH_BYTES, MAX_PATH_PARTS, folded, local_path, one_line


class RefusedError(ValueError):
    """What a host sends is damaged, or asks for more than a folder of files."""


@dataclass
class Links:
    """The links below the folder `name`. A link may lead to a place of that folder, and through no other link."""

    name: str
    targets: dict[PurePosixPath, str] = field(default_factory=dict)
    _folded: set[PurePosixPath] = field(default_factory=set)
    """The links' paths as a filesystem compares them that ignores case."""

    def add(self, path: PurePosixPath, target: str) -> None:
        """Note a link. Raises RefusedError if its target is too long."""
        if len(target) > MAX_PATH_BYTES or target.count("/") > MAX_PATH_PARTS:
            raise RefusedError(
                f"{str(path)!r} is a link to a path of more than {MAX_PATH_BYTES:,} bytes or {MAX_PATH_PARTS} parts"
            )
        self.targets[path] = target
        self._folded.add(folded(path))

    def __contains__(self, path: PurePosixPath) -> bool:
        return bool(self._folded) and folded(path) in self._folded

    def check(self) -> None:
        """Raise RefusedError unless each link stays within the folder at every step and leads through no other link."""
        for path, target in self.targets.items():
            self._check(path, target)

    def create(self, place_for: Callable[[PurePosixPath], Path]) -> None:
        """Create the links, after `check`. place_for: returns the local path of a new file, or refuses it."""
        for path, target in self.targets.items():
            place_for(path).symlink_to(target)

    def _check(self, path: PurePosixPath, target: str) -> None:
        outside = RefusedError(f"{str(path)!r} is a link to {one_line(target)!r}, outside of {one_line(self.name)!r}")
        if target.startswith("/") or not target:
            raise outside
        place = list(path.parent.parts)
        steps = [step for step in target.split("/") if step not in ("", ".")]
        for number, step in enumerate(steps, start=1):
            if step == "..":
                place = place[:-1]
            else:
                place.append(str(local_path(step)))
            if not place or place[0] != self.name:
                raise outside
            if number < len(steps) and PurePosixPath(*place) in self:
                raise RefusedError(f"{str(path)!r} is a link that leads through another link")
